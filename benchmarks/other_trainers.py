"""LLaMA-Factory and Axolotl as sides of `benchmarks/speed.py`, each in an environment of its own.

    python benchmarks/other_trainers.py set-up DIR      # a few minutes; then `benchmarks/speed.py --others DIR`

Both install on a machine without CUDA only without some of what they ask for; what is left out is listed below, and
plays no part in training a text model on a CPU. `DIR/llamafactory/bin/python` and `DIR/axolotl/bin/python` run this
file to train.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

REQUIREMENTS = {
    # Left out: av, gradio, modelscope, torchvision; torchaudio, imported but never called, is an empty module.
    "llamafactory": [
        "llamafactory==0.9.5",
        *("accelerate<=1.11.0", "datasets<=4.0.0", "peft==0.18.1", "transformers<=5.6.0", "trl<=0.24.0"),
        *("einops", "fire", "omegaconf", "pandas", "protobuf", "pydantic", "scipy", "sentencepiece", "tiktoken"),
        *("tyro<0.9.0", "matplotlib", "torchdata<=0.11.0", "fastapi", "uvicorn", "sse-starlette", "hf-transfer"),
    ],
    # Left out: what needs CUDA (xformers, liger-kernel, torchao, flash-linear-attention), cloud
    # file systems, gradio, modal, lm_eval.
    "axolotl": [
        "axolotl==0.19.0",
        *("huggingface_hub==1.17.0", "peft==0.20.0", "tokenizers==0.23.1", "transformers==5.16.1"),
        *("accelerate==1.13.0", "datasets==4.8.4", "trl==1.9.0", "kernels<0.17.0,>=0.16.0", "optimum==1.16.2"),
        *("pydantic==2.12.5", "addict", "fire", "PyYAML==6.0.3", "requests", "einops", "colorama", "scipy", "art"),
        *("numba<1.0,>=0.63.1", "python-dotenv==1.0.1", "zstandard==0.22.0", "langdetect", "immutabledict"),
        *("schedulefree==1.4.1", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6", "posthog==6.7.11"),
        *(
            "bitsandbytes==0.50.2",
            "mistral-common==1.11.5",
            "evaluate==0.4.1",
            "sentencepiece",
            "typer==0.25.1",
            "fastcore",
        ),
        *("nvidia-ml-py==12.560.30", "triton>=3.4", "wandb"),
    ],
}


def set_up(directory: Path) -> None:
    """Make both environments."""
    for name, (itself, *needed) in REQUIREMENTS.items():
        home = directory / name
        venv.create(home, with_pip=True)
        python = home / "bin" / "python"
        for packages in (["torch==2.13.0"], ["--no-deps", itself], needed):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        if name == "llamafactory":
            packages_at = next(home.glob("lib/python3*/site-packages"))
            (packages_at / "torchaudio.py").write_text('"""Empty: text training never calls it."""\n')


def clock() -> Any:
    """A callback that keeps the time, the tokens seen and the loss of each step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.tokens: list[int] = []
            self.losses: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds.append(time.monotonic())
            self.tokens.append(int(state.num_input_tokens_seen))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                self.losses.append(float(logs["loss"]))

    return Clock()


SETTINGS = {
    "per_device_train_batch_size": 12,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "seed": 42,
}


def llamafactory(work: Path, *, steps: int) -> Any:
    """LoRA as its examples write it; bf16 off, as it refuses bf16 on a CPU."""
    from llamafactory.train.tuner import run_exp

    times = clock()
    with tempfile.TemporaryDirectory() as out:
        (Path(out) / "dataset_info.json").write_text(
            json.dumps(
                {
                    "rows": {
                        "file_name": str((work / "rows.jsonl").resolve()),
                        "columns": {"prompt": "prompt", "response": "completion"},
                    }
                }
            )
        )
        run_exp(
            {
                "model_name_or_path": str(work / "base"),
                "stage": "sft",
                "do_train": True,
                "finetuning_type": "lora",
                "lora_rank": 16,
                "lora_alpha": 32,
                "lora_target": "all",
                "dataset_dir": out,
                "dataset": "rows",
                "template": "default",
                "cutoff_len": 512,
                "output_dir": str(Path(out) / "run"),
                "max_steps": steps,
                "save_strategy": "no",
                "report_to": "none",
                "bf16": False,
                "use_cpu": True,
                "include_num_input_tokens_seen": "non_padding",
                **SETTINGS,
            },
            callbacks=[times],
        )
    return times


def axolotl(work: Path, *, steps: int) -> Any:
    """LoRA as its examples write it, with what needs CUDA off."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer

    times = clock()
    with tempfile.TemporaryDirectory() as out:
        config = {
            "base_model": str(work / "base"),
            "adapter": "lora",
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_target_linear": True,
            "datasets": [
                {
                    "path": str(work / "rows.jsonl"),
                    "ds_type": "json",
                    "type": {"field_instruction": "prompt", "field_output": "completion", "format": "{instruction}\n"},
                }
            ],
            "sequence_len": 512,
            "output_dir": str(Path(out) / "run"),
            "dataset_prepared_path": str(Path(out) / "prepared"),
            "micro_batch_size": SETTINGS["per_device_train_batch_size"],
            "gradient_accumulation_steps": 1,
            "max_steps": steps,
            "num_epochs": 1,
            "optimizer": "adamw_torch",
            "lr_scheduler": "constant",
            "learning_rate": SETTINGS["learning_rate"],
            "bf16": False,
            "tf32": False,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "sdp_attention": True,
            **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False),
            "include_tokens_per_second": False,
            "seed": 42,
        }
        path = Path(out) / "config.yml"
        path.write_text(json.dumps(config))  # JSON is YAML
        settings = load_cfg(str(path))
        trainer, *_ = setup_model_and_trainer(settings, load_datasets(cfg=settings))
        trainer.args.include_num_input_tokens_seen = "non_padding"
        trainer.add_callback(times)
        trainer.train()
    return times


def main() -> None:
    """Set the environments up, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["set-up", *REQUIREMENTS])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()
    if chosen.what == "set-up":
        set_up(chosen.directory)
        return
    os.environ |= {"DISABLE_VERSION_CHECK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    side = {"llamafactory": llamafactory, "axolotl": axolotl}[chosen.what]
    times = side(chosen.directory, steps=chosen.steps)
    measured = {
        "losses": times.losses,
        "tokens": times.tokens,
        "seconds": times.seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (chosen.directory / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
