"""Training speed: lorafit, lorafit with each lever off, plain TRL, and a bare PyTorch loop, in turn, in one run.

    python benchmarks/speed.py [--rounds 3] [--steps 20] [--threads 2] [--others DIR] [--out FILE.json]

Every side trains LoRA r=16 on all linear layers of one Llama of random weights, on rows as long as GSM8K's, in a
process of its own. Useful tokens/s leaves out padding and the first six steps. First, in float32, each side's losses
are compared with TRL's on the same batches; a side that computes something else ends the benchmark.

    trl-defaults     as TRL's documentation writes it: padded, activation checkpointing on
    trl-padded       the same with checkpointing off
    trl-packed       packing, checkpointing off: the settings of `lorafit`
    bare-loop        the packed batches through model, cross-entropy, backward, AdamW; no trainer
    lorafit-padded   as trl-padded
    lorafit          packing and every lever
    lorafit-no-*     one lever off
    *-float32        the same in float32 instead of bfloat16 autocast

Then what a trainer does around the model: milliseconds a step of a model so small that there is little else, one row a
step, in float32.

With `--others DIR` (see other_trainers.py) also LLaMA-Factory and Axolotl, padded as their examples are, in float32,
which is all they take on a CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from other_trainers import REQUIREMENTS

BASE_TOKENIZER = Path(__file__).parent.parent / "recipes" / "quickstart" / "base"
TEXT = Path(__file__).parent.parent / "recipes" / "quickstart" / "train.jsonl"
WARM_UP_STEPS, EQUALITY_STEPS = 6, 4
LEVERS = ("varlen_attention", "fused_lora", "answer_head", "last_layer")
SIDES = (
    *("trl-defaults", "trl-padded", "trl-packed", "bare-loop", "lorafit-padded", "lorafit"),
    *(f"lorafit-no-{lever}" for lever in LEVERS),
    *("trl-packed-float32", "bare-loop-float32", "lorafit-float32"),
)
OTHERS = ("llamafactory", "axolotl")
OTHERS_SCRIPT = Path(__file__).parent / "other_trainers.py"
TINY_SIDES = ("trl-padded", "lorafit-padded", "trl-packed", "lorafit")
TINY_STEPS = 200
MAX_LENGTH = 512
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TRAINING: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "seed": 42,
}


def rows_per_step(work: Path, *, packed: bool) -> int:
    """3 packed rows of 512 tokens hold about as much as 12 rows of 130."""
    if work.name == "tiny":
        return 1
    return 3 if packed else 12


def write_base(directory: Path, *, tiny: bool = False) -> None:
    """26 M parameters: 8 layers of width 384, a vocabulary of 32,000, the quickstart's tokenizer; or next to none."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096 if tiny else 32_000,
        hidden_size=16 if tiny else 384,
        intermediate_size=16 if tiny else 1024,
        num_hidden_layers=1 if tiny else 8,
        num_attention_heads=1 if tiny else 6,
        num_key_value_heads=1 if tiny else 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(BASE_TOKENIZER).save_pretrained(directory)


def write_rows(file: Path, *, count: int, tokens: int | None = None) -> None:
    """Real words in rows as long as GSM8K's: log-normal around 121 tokens, a little under half of it the question; or
    of about `tokens` each."""
    chance = random.Random(0)
    words = " ".join(json.loads(line)["completion"] for line in TEXT.read_text().splitlines()).split()
    with file.open("w") as lines:
        for _ in range(count):
            length = tokens or min(400, max(30, round(chance.lognormvariate(4.796, 0.38))))
            count_of_words = max(4, round(length / 2.6))  # tokens a word of this text
            start = chance.randrange(len(words) - count_of_words)
            taken = words[start : start + count_of_words]
            cut = round(0.45 * count_of_words)
            lines.write(json.dumps({"prompt": " ".join(taken[:cut]), "completion": " ".join(taken[cut:])}) + "\n")


def clock() -> Any:
    """A callback that keeps the time at the end of each step, and what all threads have computed until then."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds: list[float] = []
        cpu_seconds: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.monotonic())
            self.cpu_seconds.append(time.process_time())

    return Clock()


def plain_trl(work: Path, *, side: str, steps: int, bf16: bool) -> dict[str, Any]:
    """What an engineer writes by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    packed = side == "trl-packed"
    return train_with_trl(
        work / "rows.jsonl",
        AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32),
        cache=work / "datasets",
        max_steps=steps,
        bf16=bf16,
        max_length=MAX_LENGTH,
        packing=packed,
        per_device_train_batch_size=rows_per_step(work, packed=packed),
        **({} if side == "trl-defaults" else {"activation_checkpointing": False}),
    )


def train_with_trl(rows: Path, model: Any, *, cache: Path, **settings: Any) -> dict[str, Any]:
    """TRL's trainer as its documentation writes it, with these settings of `SFTConfig`."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    times = clock()
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache)).map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=out,
                save_strategy="no",
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
                report_to="none",
                **settings,
                **TRAINING,
            ),
            train_dataset=data,
            peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
            callbacks=[times],
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, tokens = [entry["loss"] for entry in logs], [entry["num_tokens"] for entry in logs]
    return measured_steps(losses, tokens, times.seconds, cpu_seconds=times.cpu_seconds)


def bare_loop(work: Path, *, steps: int, bf16: bool) -> dict[str, Any]:
    """Model, cross-entropy, backward and AdamW over the packed batches of TRL: nothing that a trainer adds."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    encoded = []
    for line in (work / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        prompt: Any = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        whole: Any = tokenizer.apply_chat_template(turns, return_dict=False)
        encoded.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
    packed = pack_dataset(Dataset.from_list(encoded), MAX_LENGTH, "bfd")
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)
    torch.manual_seed(42)
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, fused=True)
    losses, tokens, seconds, cpu_seconds, total = [], [], [], [], 0
    size = rows_per_step(work, packed=True)
    for step in range(steps):
        batch = collate([packed[(step * size + i) % len(packed)] for i in range(size)])
        labels = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(**batch, use_cache=False).logits
        loss = functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += labels.shape[1]
        losses.append(loss.item())
        tokens.append(total)
        seconds.append(time.monotonic())
        cpu_seconds.append(time.process_time())
    return measured_steps(losses, tokens, seconds, cpu_seconds=cpu_seconds)


def with_lorafit(work: Path, *, side: str, steps: int, bf16: bool) -> dict[str, Any]:
    """The same as a recipe."""
    packed = side != "lorafit-padded"
    recipe = {
        "model": {"model_name_or_path": str(work / "base"), "dtype": "float32"},
        "data": {"train": [{"path": str(work / "rows.jsonl")}]},
        "training": {
            "max_steps": steps,
            "bf16": bf16,
            "max_length": MAX_LENGTH,
            "packing": packed,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": rows_per_step(work, packed=packed),
        },
        "speed": {lever: not side.endswith(lever) for lever in LEVERS},
    }
    return train_with_lorafit(recipe, cache=work / "cache")


def train_with_lorafit(recipe: dict[str, Any], *, cache: Path) -> dict[str, Any]:
    """The recipe with what all sides share, in this process."""
    import yaml

    from lorafit.recipe import load
    from lorafit.training.train import run_training

    times = clock()
    with tempfile.TemporaryDirectory() as directory:
        run, path = Path(directory) / "run", Path(directory) / "recipe.yaml"
        shared = {
            "output_dir": str(run),
            "lora": LORA,
            "training": TRAINING | recipe["training"],
            "checkpoints": {"every": recipe["training"]["max_steps"]},
        }
        path.write_text(yaml.safe_dump(recipe | shared), encoding="utf-8")
        run_training(load(path), cache_dir=cache, watchers=[times])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logs = [entry for entry in lines if "loss" in entry]
    losses, tokens = [entry["loss"] for entry in logs], [entry["tokens"] for entry in logs]
    return measured_steps(losses, tokens, times.seconds, cpu_seconds=times.cpu_seconds)


def measured_steps(
    losses: list[float],
    tokens: list[float],
    seconds: list[float],
    *,
    cpu_seconds: list[float] | None = None,
    peak: int | None = None,
) -> dict[str, Any]:
    """Useful tokens per second after the first steps, from what was logged at each; and per second that a thread
    computed, which counts what others do on the machine for less."""
    first = min(WARM_UP_STEPS, len(losses) - 2)
    useful = tokens[-1] - tokens[first - 1]
    return {
        "losses": losses,
        "tokens_per_second": useful / (seconds[-1] - seconds[first - 1]),
        "tokens_per_cpu_second": useful / (cpu_seconds[-1] - cpu_seconds[first - 1]) if cpu_seconds else None,
        "tokens_per_step": useful / (len(losses) - first),
        "peak_memory_bytes": _peak_memory_bytes() if peak is None else peak,
    }


def _peak_memory_bytes() -> int:
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_side(work: Path, *, side: str, steps: int, bf16: bool) -> dict[str, Any]:
    """This process, as one side."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if side == "bare-loop":
        return bare_loop(work, steps=steps, bf16=bf16)
    if side.startswith("trl"):
        return plain_trl(work, side=side, steps=steps, bf16=bf16)
    return with_lorafit(work, side=side, steps=steps, bf16=bf16)


def in_its_own_process(
    work: Path,
    *,
    side: str,
    steps: int,
    threads: int,
    others: Path | None = None,
    bf16: bool = True,
    cpu: Mapping[str, str] = {},
) -> dict[str, Any]:
    """One side, measured in a fresh process; `cpu`: variables that narrow what torch uses of the CPU."""
    out = work / "measured.json"
    out.unlink(missing_ok=True)
    if side in OTHERS:
        assert others is not None
        command = [others / side / "bin" / "python", OTHERS_SCRIPT, side, work, "--steps", str(steps)]
    else:
        name = side.removesuffix("-float32")
        in_float32 = ["--float32"] if name != side or not bf16 else []
        command = [sys.executable, __file__, "--side", name, "--work", work, "--steps", str(steps), *in_float32]
    ours = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    environment = {**os.environ, **ours, **cpu}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    measured = json.loads(out.read_text())
    if side in OTHERS:
        peak = measured["peak_memory_bytes"]
        return measured_steps(measured["losses"], measured["tokens"], measured["seconds"], peak=peak)
    return measured


def refuse_other_work(work: Path, *, sides: list[str], threads: int) -> dict[str, float]:
    """Largest difference of a loss to TRL's on the same batches, float32, four steps; ends where it exceeds 1e-3."""
    found = {}
    for reference in ("trl-padded", "trl-packed"):
        theirs = in_its_own_process(work, side=reference, steps=EQUALITY_STEPS, bf16=False, threads=threads)["losses"]
        padded = reference == "trl-padded"
        ours_here = [side for side in sides if side.startswith("lorafit") and not side.endswith("float32")]
        same = [side for side in ours_here if (side == "lorafit-padded") == padded]
        for side in same + (["trl-defaults"] if padded else []):
            ours = in_its_own_process(work, side=side, steps=EQUALITY_STEPS, bf16=False, threads=threads)["losses"]
            found[side] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            print(f"{side:<30} largest difference of a loss to {reference}: {found[side]:.1e}", flush=True)
            if found[side] > 1e-3:
                sys.exit(f"{side} does not compute what {reference} computes")
    return found


def main() -> None:
    """Compare the work, then the speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--others", type=Path, help="directory made by `other_trainers.py set-up`")
    parser.add_argument("--out", type=Path, help="write the results here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--float32", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        measured = one_side(chosen.work, side=chosen.side, steps=chosen.steps, bf16=not chosen.float32)
        (chosen.work / "measured.json").write_text(json.dumps(measured))
        return
    sides = [*chosen.sides, *(OTHERS if chosen.others else ())]
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write_base(work / "base")
        write_rows(work / "rows.jsonl", count=rows_per_step(work, packed=False) * (chosen.steps + 2))
        apart = refuse_other_work(work, sides=sides, threads=chosen.threads)
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        settings = {"steps": chosen.steps, "threads": chosen.threads, "others": chosen.others}
        for _ in range(chosen.rounds):
            for side in sides:
                rounds[side].append(in_its_own_process(work, side=side, **settings))
        tiny = milliseconds_around(work / "tiny", rounds=chosen.rounds, threads=chosen.threads)
    report = summary(rounds, apart=apart, tiny=tiny, chosen=chosen)
    print(table(report))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(report, indent=2) + "\n")


def milliseconds_around(work: Path, *, rounds: int, threads: int) -> dict[str, float]:
    """What a step takes besides the model, by side: the median over the rounds."""
    work.mkdir()
    write_base(work / "base", tiny=True)
    write_rows(work / "rows.jsonl", count=5 * TINY_STEPS)
    found: dict[str, list[float]] = {side: [] for side in TINY_SIDES}
    for _ in range(rounds):
        for side in TINY_SIDES:
            one = in_its_own_process(work, side=side, steps=TINY_STEPS, bf16=False, threads=threads)
            found[side].append(1e3 * one["tokens_per_step"] / one["tokens_per_second"])
    return {side: statistics.median(milliseconds) for side, milliseconds in found.items()}


def summary(
    rounds: dict[str, list[dict[str, Any]]],
    *,
    apart: dict[str, float],
    tiny: dict[str, float],
    chosen: argparse.Namespace,
) -> dict[str, Any]:
    """Medians and ranges, and how many times as fast lorafit was in the same round."""
    sides = {}
    for side, measured in rounds.items():
        speeds = [one["tokens_per_second"] for one in measured]
        ratios = {}
        for ours in ("lorafit", "lorafit-float32"):
            if ours in rounds:
                pairs = zip(rounds[ours], measured, strict=True)
                ratios[ours] = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
        sides[side] = {
            "tokens_per_second": statistics.median(speeds),
            "range": [min(speeds), max(speeds)],
            "tokens_per_step": measured[0]["tokens_per_step"],
            "peak_memory_bytes": max(one["peak_memory_bytes"] for one in measured),
            "times_as_fast": ratios,
        }
    packages = ("lorafit", "torch", "transformers", "trl", "peft", "accelerate")
    settings = " ".join(f"--{name} {getattr(chosen, name)}" for name in ("threads", "rounds", "steps"))
    return {
        "command": f"python benchmarks/speed.py {settings}{' --others DIR' if chosen.others else ''}",
        "device": _processor(),
        "threads": chosen.threads,
        "date": date.today().isoformat(),
        "versions": {package: version(package) for package in packages}
        | ({name: itself.partition("==")[2] for name, (itself, *_) in REQUIREMENTS.items()} if chosen.others else {}),
        "largest_difference_of_a_loss": apart,
        "sides": sides,
        "milliseconds_a_step_of_a_tiny_model": tiny,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def table(report: dict[str, Any]) -> str:
    """The sides, a line each."""
    lines = [f"{'side':<28} tokens/s (range)          lorafit is x as fast   in float32   peak memory"]
    for side, row in report["sides"].items():
        low, high = row["range"]
        ratios = [f"{row['times_as_fast'].get(name, float('nan')):>12.2f}" for name in ("lorafit", "lorafit-float32")]
        speed = f"{row['tokens_per_second']:>8,.0f} ({low:,.0f}-{high:,.0f})"
        lines.append(f"{side:<28} {speed:<26} {' '.join(ratios)}  {row['peak_memory_bytes'] / 2**20:>8,.0f} MiB")
    for side, milliseconds in report["milliseconds_a_step_of_a_tiny_model"].items():
        lines.append(f"{side:<28} {milliseconds:>8.1f} ms a step of a model of next to nothing")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
