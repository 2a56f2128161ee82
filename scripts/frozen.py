"""Record everything lorafit produces for a fixed set of commands; or say what has changed since a record was made.

    python scripts/frozen.py record before.json
    python scripts/frozen.py compare before.json

For changes of shape, which may change no byte. On a tiny base made here it trains LoRA, QLoRA, DoRA, AdaLoRA, packed,
in two processes, broken off and resumed; then merges, combines, evaluates, reports, sweeps and plans, and gives each of
a list of bad inputs. Of each command: exit code, both outputs, and the SHA-256 of every file it left, without what the
clock, the memory and the directory say. A record holds for one machine. About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TESTS = Path(__file__).parents[1] / "tests"
TRAINING = {
    "max_length": 64,
    "max_steps": 6,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "bf16": False,
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"training": EVALUATED, "lora": {"r": 4, "lora_dropout": 0.1}},
    "qlora": {"quantization": {"load_in_4bit": True}, "training": EVALUATED},
    "dora": {"lora": {"r": 4, "use_dora": True}, "training": {"neftune_noise_alpha": 5.0}},
    "adalora": {"lora": None, "adalora": {"init_r": 6, "target_r": 5, "tinit": 2, "tfinal": 2, "delta_t": 1}},
    "packed": {"training": EVALUATED | {"packing": True, "max_length": 96, "gradient_accumulation_steps": 1}},
    "two": {"training": EVALUATED | {"gradient_accumulation_steps": 1}, "launch": {"num_processes": 2}},
    "resumed": {"training": EVALUATED | {"max_steps": 40}, "checkpoints": {"every": 2}},
    "overfit": {"training": EVALUATED | {"learning_rate": 0.1}, "early_stopping": {"patience": 1}},
}
BAD: dict[str, dict[str, Any]] = {
    "misspelt key": {"lora": {"r": 4, "lora_alfa": 8}},
    "no such target": {"lora": {"r": 4, "target_modules": ["q_prog"]}},
    "no data": {"data": {"train": [{"path": "nowhere.jsonl"}]}},
    "cut short": {"training": {"max_length": 8}},
    "no learning rate": {"training": {"learning_rate": 0.0}},
    "learns nothing": {"training": {"learning_rate": 1e-30, "max_grad_norm": 1e-30}},
    "high learning rate": {"training": {"learning_rate": 10.0, "lr_scheduler_type": "constant", "max_steps": 30}},
}


@dataclass(frozen=True)
class Command:
    """`lorafit WORDS`, in the directory that all commands of a record share."""

    name: str
    words: tuple[str, ...]
    leaves: str = ""
    """The directory whose files are recorded."""
    stopped_at: str = ""
    """It is told to stop when this is there; then nothing is recorded but that it ran."""


def commands() -> list[Command]:
    """In order; later ones read what earlier ones left."""
    found = [
        Command(f"{step} {name}", (step, f"{name}.yaml"))
        for name in (*RECIPES, *BAD)
        for step in ("validate", "preview")
        if name not in RECIPES or name == "lora"
    ]
    for name in RECIPES:
        if name == "resumed":
            first = "resumed-run/checkpoints/checkpoint-2"
            found.append(Command("train stopped", ("train", "resumed.yaml"), stopped_at=first))
            found.append(
                Command("train resumed", ("train", "resumed.yaml", "--resume", "--json"), "resumed-run/adapter")
            )
            continue
        found.append(Command(f"train {name}", ("train", f"{name}.yaml", "--json"), f"{name}-run"))
    found += [Command(f"train {name}", ("train", f"{name}.yaml", "--json"), f"{name}-run") for name in BAD]
    found += [
        Command("train again", ("train", "lora.yaml")),
        Command("merge lora", ("merge", "lora-run", "--out", "merged", "--json"), "merged"),
        Command("merge qlora", ("merge", "qlora-run", "--json"), "qlora-run/merged"),
        Command("merge dora", ("merge", "dora-run", "--json"), "dora-run/merged"),
        Command("combine", ("combine", "lora-run:0.5", "packed-run:0.5", "--out", "both", "--json"), "both"),
        Command(
            "combine ties",
            ("combine", "lora-run", "packed-run", "--method", "ties", "--density", "0.5", "--out", "ties"),
            "ties",
        ),
        Command("eval lora", ("eval", "lora-run", "--json")),
        Command("eval qlora", ("eval", "qlora-run", "--json")),
        Command("report", ("report", "lora-run", "--json")),
        Command("sweep", ("rank-sweep", "sweep.yaml", "--json"), "sweep-run"),
        Command("plan", ("plan", "lora.yaml", "--json")),
        Command("targets", ("targets", "base", "--json")),
        Command("schema", ("schema",)),
        Command("merge nothing", ("merge", "nowhere")),
        Command("eval nothing", ("eval", "nowhere")),
        Command("no such command", ("trian",)),
    ]
    return found


def build(directory: Path) -> None:
    """A tiny base model, rows, and the recipes."""
    from support.tiny import build_base, sums, write_jsonl

    build_base(directory / "base")
    for name, first in (("train", 0), ("eval", 100)):
        write_jsonl(directory / f"{name}.jsonl", sums(24, first=first))
    for name, sections in {**RECIPES, **BAD}.items():
        write_recipe(directory, name, sections)
    write_recipe(directory, "sweep", {"rank_sweep": {"ranks": [1, 2, 4], "eps": 0.01}, "training": EVALUATED})


def write_recipe(directory: Path, name: str, sections: dict[str, Any]) -> None:
    """`sections` laid over a small LoRA recipe; None removes one."""
    whole: dict[str, Any] = {
        "output_dir": f"{name}-run",
        "model": {"model_name_or_path": "base", "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}]},
    }
    whole |= sections | {"training": TRAINING | sections.get("training", {})}
    whole = {key: section for key, section in whole.items() if section is not None}
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(whole))


VOLATILE = re.compile(
    r"(seconds|per_second|memory|bytes|elapsed|started|finished_at|created|time|pid|versions|machine|host|speed|log|reserve)"
)


def steady(value: Any) -> Any:
    """A JSON value without what the clock and the memory decide."""
    if isinstance(value, dict):
        return {key: steady(inner) for key, inner in value.items() if not VOLATILE.search(key)}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


def plain(text: str, directory: Path) -> str:
    """Text without the directory, and without figures that have a unit of time, speed or memory."""
    text = text.replace(str(directory), "DIR")
    text = re.sub(r"\d[\d.,]*\s*(ms|s|min|h|minutes?|seconds?|tokens/s|[KMGT]i?B)\b", "N \\1", text)
    text = re.sub(r"(seconds\s+)\d[\d.]*", "\\1N", text)
    return re.sub(r"\d{4}-\d\d-\d\d[T ][\d:.]+\S*", "DATE", text)


def hash_of(path: Path, directory: Path) -> str:
    """Of a file; of its steady part when it is JSON or text that says when it was made."""
    data = path.read_bytes()
    if path.suffix == ".json":
        data = json.dumps(steady(json.loads(data)), sort_keys=True).replace(str(directory), "DIR").encode()
    elif path.suffix == ".jsonl":
        lines = [steady(json.loads(line)) for line in data.splitlines()]
        data = plain(json.dumps(lines, sort_keys=True), directory).encode()
    elif path.suffix in (".md", ".yaml", ".txt", ".jinja"):
        data = plain(data.decode(), directory).encode()
    return hashlib.sha256(data).hexdigest()[:16]


# These hold the clock, or hashes of what does.
SKIPPED = re.compile(
    r"^(trainer_state|checkpoint|manifest)\.json$|\.(pt|bin|journal|db|sqlite3?|log|html|svg|png|lock|arrow)$"
)


def files_of(directory: Path, leaves: str) -> dict[str, str]:
    """SHA-256 (the first 16 digits) of every file below `leaves` that only its input decides."""
    top = directory / leaves
    if not leaves or not top.exists():
        return {}
    found = sorted(path for path in top.rglob("*") if path.is_file())
    return {
        str(path.relative_to(top)): "there" if SKIPPED.search(path.name) else hash_of(path, directory) for path in found
    }


def record() -> dict[str, Any]:
    """Of every command: code, outputs, files."""
    from support.commands import Starter

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as parent:
        directory, streams = Path(parent) / "work", Path(parent) / "streams"
        directory.mkdir()
        build(directory)
        os.chdir(directory)  # which its commands are given in
        starter = Starter()
        for command in commands():
            under_way = starter.start(streams, *command.words)
            if command.stopped_at:
                under_way.until((directory / command.stopped_at).exists)
                under_way.send(signal.SIGTERM)
                under_way.ended()
                continue
            ended = under_way.ended()
            try:
                printed: Any = steady(json.loads(ended.out))
            except ValueError:
                printed = plain(ended.out, directory).splitlines()
            printed = json.loads(json.dumps(printed).replace(str(directory), "DIR"))
            said = [line for line in plain(ended.err, directory).splitlines() if line.startswith(("error", "warning"))]
            files = files_of(directory, command.leaves)
            found[command.name] = {"code": ended.code, "out": printed, "said": said, "files": files}
            print(f"{command.name}: {ended.code}, {len(files)} files", file=sys.stderr)
        starter.close()
        os.chdir("/")
    return found


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Every place at which two records differ, one line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(before.keys() | now.keys())
            for line in differences(before.get(key, "absent"), now.get(key, "absent"), f"{where} / {key}")
        ]
    return [] if before == now else [f"{where.removeprefix(' / ')}: {before!r} -> {now!r}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    arguments.file = arguments.file.absolute()
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONWARNINGS": "ignore"}
    sys.path.insert(0, str(TESTS))
    now = record()
    if arguments.what == "record":
        arguments.file.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
        return
    changed = differences(json.loads(arguments.file.read_text()), now)
    print("\n".join(changed) or f"nothing has changed in {len(now)} commands")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
