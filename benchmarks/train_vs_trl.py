"""Training with lorafit beside a plain TRL script: the same base, rows and settings, in turn, in one run.

    python benchmarks/train_vs_trl.py [--steps 40] [--rounds 3] [--threads 2]

First in float32, where the two loss curves are compared step by step, then in bfloat16 autocast for speed. Steady
tokens/s leaves out the first ten steps. Both sides train on the quickstart's base and rows, with the chat template and
the loss on answers only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from lorafit.recipe import load
from lorafit.training.train import train

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
BASE, ROWS = QUICKSTART / "base", QUICKSTART / "train.jsonl"
WARM_UP_STEPS = 10
SETTINGS = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 1,
    "seed": 42,
}


class Clock(TrainerCallback):
    """Seconds at the end of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time."""
        self.seconds.append(time.monotonic())


def plain_trl(directory: Path, *, steps: int, bf16: bool) -> dict[str, Any]:
    """What an engineer writes by hand."""
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = load_dataset("json", data_files=str(ROWS), split="train", cache_dir=str(directory / "datasets"))
    rows = rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16 if bf16 else torch.float32),
        args=SFTConfig(
            output_dir=str(directory / "trl"),
            max_steps=steps,
            bf16=bf16,
            max_length=256,
            activation_checkpointing=False,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
            **SETTINGS,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = logs[-1]["num_tokens"] - logs[WARM_UP_STEPS - 1]["num_tokens"]
    seconds = clock.seconds[-1] - clock.seconds[WARM_UP_STEPS - 1]
    return {"losses": [entry["loss"] for entry in logs], "tokens_per_second": tokens / seconds}


def with_lorafit(directory: Path, *, steps: int, bf16: bool) -> dict[str, Any]:
    """The same as a recipe."""
    recipe = {
        "output_dir": str(directory / "run"),
        "model": {"model_name_or_path": str(BASE), "dtype": "bfloat16" if bf16 else "float32"},
        "data": {"train": [{"path": str(ROWS)}]},
        "training": {"max_steps": steps, "bf16": bf16, "max_length": 256, "gradient_checkpointing": False, **SETTINGS},
        "checkpoints": {"every": steps},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train(load(path), say=lambda line: None, show_progress=False, cache_dir=directory / "cache")
    lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    logs = [entry for entry in lines if "loss" in entry]
    first, last = logs[WARM_UP_STEPS - 1], logs[-1]
    speed = (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
    return {"losses": [entry["loss"] for entry in logs], "tokens_per_second": speed}


def once(side: Any, **settings: Any) -> dict[str, Any]:
    """One run of one side in a directory of its own, its chatter swallowed."""
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        return side(Path(directory), **settings)


def main() -> None:
    """Compare the curves, then the speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()

    ours, theirs = once(with_lorafit, steps=20, bf16=False), once(plain_trl, steps=20, bf16=False)
    apart = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    print(f"loss curves, float32, 20 steps: largest difference {apart:.2e}")
    for bf16 in (False, True):
        pairs = [
            (once(with_lorafit, steps=chosen.steps, bf16=bf16), once(plain_trl, steps=chosen.steps, bf16=bf16))
            for _ in range(chosen.rounds)
        ]
        speeds = [(a["tokens_per_second"], b["tokens_per_second"]) for a, b in pairs]
        ratio = statistics.median(a / b for a, b in speeds)
        kind = "bfloat16" if bf16 else "float32"
        median_ours, median_theirs = (statistics.median(side) for side in zip(*speeds, strict=True))
        print(f"{kind}: lorafit {median_ours:,.0f} tokens/s, TRL {median_theirs:,.0f} tokens/s, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
