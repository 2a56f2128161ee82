"""How long lorafit takes to begin: what a command takes before its work, and the first training step, beside TRL.

    python benchmarks/startup.py [--rounds 7] [--quick] [--only help|commands|steps]

Everything in fresh processes; medians, in seconds on the clock and in seconds of CPU, which grow less when the machine
is busy. Wanted on 2 cores: `--help` at most 0.2 s; `validate` of a recipe with 1,000 rows at most 0.5 s; and a second
start, with the tokens of the first in the cache, sooner at its first step than a TRL script with its datasets cached.

The commands: those that load libraries, on the quickstart (trained for 20 steps, all held-out rows) and, for `plan`, on
an 8B model; each as a multiple of `python -c "import torch"`, which runs before each of them.

The first step: a 26 M Llama and 7,473 rows as long as GSM8K's (1,000 with --quick), one packed row of 512 a step,
LoRA r=16, from the start of the process to the end of the first optimizer step, lorafit and TRL by turns. A cold start
finds no tokens; lorafit's very first one also compares packed, divided and plain computation, once for each model,
setting and set of versions.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from speed import LORA, MAX_LENGTH, write_base, write_rows
from speed import TRAINING as STEPS

TRAINING = STEPS | {"per_device_train_batch_size": 1, "max_steps": 2}
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
VALIDATED_ROWS, ROWS, FEW_ROWS = 1_000, 7_473, 1_000
Seconds = tuple[float, float]
"""On the clock and of CPU."""

RECIPE = f"""\
model: {{model_name_or_path: base, dtype: float32}}
data: {{train: [{{path: rows.jsonl}}], over_length: truncate}}
lora: {json.dumps(LORA)}
training: {json.dumps(TRAINING | {"packing": True, "max_length": MAX_LENGTH, "bf16": False})}
"""
TRL = f"""\
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer


class FirstStep(TrainerCallback):
    def on_step_end(self, *_, **__):
        Path(sys.argv[1], "metrics.jsonl").write_text("done")


rows = load_dataset("json", data_files="rows.jsonl", split="train", cache_dir="datasets")
rows = rows.map(
    lambda row: {{
        "prompt": [{{"role": "user", "content": row["prompt"]}}],
        "completion": [{{"role": "assistant", "content": row["completion"]}}],
    }}
)
settings = dict(packing=True, max_length={MAX_LENGTH}, bf16=False, use_cpu=not torch.cuda.is_available())
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32),
    args=SFTConfig(sys.argv[1], activation_checkpointing=False, report_to="none", **settings, **{TRAINING!r}),
    train_dataset=rows,
    peft_config=LoraConfig(**{LORA!r}, task_type="CAUSAL_LM"),
    callbacks=[FirstStep()],
)
trainer.train()
"""


def whole(command: list[str], directory: Path) -> Seconds:
    """From the start of a process to its end."""
    started, used = time.perf_counter(), _cpu_seconds_of_children()
    subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started, _cpu_seconds_of_children() - used


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def until_first_step(command: list[str], directory: Path) -> Seconds:
    """From the start of a process to the first line of its metrics; it is ended then. Its run directory goes last."""
    shutil.rmtree(directory / "run", ignore_errors=True)
    environment = os.environ | {"LORAFIT_CACHE": str(directory / "cache"), "HF_HUB_OFFLINE": "1"}
    metrics, errors = directory / "run" / "metrics.jsonl", directory / "errors.txt"
    started = time.perf_counter()
    with errors.open("w") as stderr:
        process = psutil.Popen(
            [*command, "run"], cwd=directory, env=environment, stdout=subprocess.DEVNULL, stderr=stderr
        )
    while not (metrics.is_file() and metrics.stat().st_size):
        if process.poll() is not None:
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{errors.read_text()[-3000:]}")
        time.sleep(0.005)
    seconds, used = time.perf_counter() - started, process.cpu_times()
    process.kill()
    process.wait()
    return seconds, used.user + used.system


def write_validated(directory: Path) -> None:
    """A recipe with 1,000 chat rows of about 400 characters."""
    question, answer = "How does it work? " * 6, "It works like this, step by step. " * 9
    with (directory / "chats.jsonl").open("w", encoding="utf-8") as file:
        for number in range(VALIDATED_ROWS):
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"{number} {answer}"},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    (directory / "validated.yaml").write_text(
        "model: {model_name_or_path: org/elsewhere}\ndata: {train: [{path: chats.jsonl}], eval_fraction: 0.1}\n",
        encoding="utf-8",
    )
    (directory / "with_base.yaml").write_text(
        "model: {model_name_or_path: ./base}\ndata: {train: [{path: chats.jsonl}], eval_fraction: 0.1}\n",
        encoding="utf-8",
    )


def compare_commands(directory: Path, *, rounds: int) -> None:
    """What answers without torch."""
    write_validated(directory)
    lorafit, trl = [sys.executable, "-m", "lorafit"], str(Path(sys.executable).parent / "trl")
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "lorafit --help": [*lorafit, "--help"],
        f"lorafit validate ({VALIDATED_ROWS:,} rows)": [*lorafit, "validate", "validated.yaml"],
        "the same, with a base on disk": [*lorafit, "validate", "with_base.yaml"],
        "the same, every row tokenized": [*lorafit, "validate", "with_base.yaml", "--set", "training.max_length=400"],
        "trl --help": [trl, "--help"],
    }
    for name, command in commands.items():
        whole(command, directory)  # fills the file cache
        report(name, [whole(command, directory) for _ in range(3 if command[0] == trl else rounds)])


def compare_with_torch(directory: Path, *, rounds: int) -> None:
    """The commands that load libraries, each beside an import of torch just before it."""
    lorafit, recipe = [sys.executable, "-m", "lorafit"], str(RECIPES / "quickstart.yaml")
    few_steps = ["--set", "training.max_steps=20", "--output-dir", "quickstart"]
    whole([*lorafit, "train", recipe, *few_steps], directory)
    commands = {
        "preview": [recipe],
        "targets": [str(RECIPES / "quickstart/base")],
        "report": ["quickstart"],
        "doctor": [],
        "plan": [str(RECIPES / "llama3-8b-lora.yaml"), "--model-shape", "llama3-8b", "--gpu", "a100-80"],
        "merge": ["quickstart"],
        "eval": ["quickstart"],
    }
    print('as multiples of python -c "import torch":')
    for name, arguments in commands.items():
        imported, taken = [], []
        for _ in range(rounds + 1):
            if name == "merge":
                shutil.rmtree(directory / "quickstart/merged", ignore_errors=True)
            imported.append(whole([sys.executable, "-c", "import torch"], directory))
            taken.append(whole([*lorafit, name, *arguments], directory))
        report(f"lorafit {name}", taken[1:], others=imported[1:], of="import torch")  # the first fills the caches


def compare_first_steps(directory: Path, *, rounds: int, rows: int) -> None:
    """lorafit and TRL by turns, and the medians of the ratios."""
    write_rows(directory / "rows.jsonl", count=rows)
    (directory / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (directory / "train.py").write_text(TRL, encoding="utf-8")
    ours = [sys.executable, "-m", "lorafit", "train", "recipe.yaml", "--output-dir"]
    theirs = [sys.executable, "train.py"]
    first = until_first_step(ours, directory)
    until_first_step(theirs, directory)
    cold, cold_trl, warm, warm_trl = [], [], [], []
    for _ in range(rounds):
        for entry in (directory / "cache").iterdir():
            if entry.name != "selftest":
                shutil.rmtree(entry)
        shutil.rmtree(directory / "datasets")
        cold.append(until_first_step(ours, directory))
        cold_trl.append(until_first_step(theirs, directory))
        warm.append(until_first_step(ours, directory))
        warm_trl.append(until_first_step(theirs, directory))
    print(f"to the first step, {rows:,} rows:")
    report("lorafit, the very first", [first])
    report("lorafit, cold", cold)
    report("TRL, cold", cold_trl, others=cold)
    report("lorafit, second start", warm)
    report("TRL, second start", warm_trl, others=warm)


def report(name: str, measured: list[Seconds], *, others: list[Seconds] | None = None, of: str = "lorafit's") -> None:
    """One line of medians; with `others`, how many times as long as these it took."""
    of_clock, of_cpu = (statistics.median(one[kind] for one in measured) for kind in (0, 1))
    pairs = [*zip(measured, others or measured, strict=True)]
    ratios = [statistics.median(one[kind] / other[kind] for one, other in pairs) for kind in (0, 1)]
    times = f"   {ratios[0]:.2f} times {of}, {ratios[1]:.2f} of CPU" if others else ""
    print(f"{name:<32} {of_clock:7.3f} s   {of_cpu:7.3f} s of CPU{times}", flush=True)


def main() -> None:
    """Print one line per command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two rounds, 1,000 rows")
    parser.add_argument("--only", choices=["help", "commands", "steps"], help="one of the three parts")
    chosen = parser.parse_args()
    rounds = 2 if chosen.quick else chosen.rounds
    with tempfile.TemporaryDirectory() as name:
        write_base(Path(name, "base"))
        if chosen.only in (None, "help"):
            compare_commands(Path(name), rounds=rounds)
        if chosen.only in (None, "commands"):
            compare_with_torch(Path(name), rounds=rounds)
        if chosen.only in (None, "steps"):
            compare_first_steps(Path(name), rounds=rounds, rows=FEW_ROWS if chosen.quick else ROWS)


if __name__ == "__main__":
    main()
