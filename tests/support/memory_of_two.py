"""What `test_out_of_memory_of_two.py` runs: memory that runs out in the first of two processes. Prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trl import SFTTrainer

from lorafit.tasks.causal_lm_trainer import rows_of
from support.forked import session
from support.out_of_memory import CUDA, PACKED, RIGHT_STEP
from support.runs import small_recipe

SETTINGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def runs_out(*, after_backward: bool) -> Callable[[], None]:
    """In this process, at the second step, where more than one row is computed at once."""

    def step(trainer: SFTTrainer, model: nn.Module, inputs: Any, num_items: Any = None) -> torch.Tensor:
        is_full = trainer.state.global_step == 1 and len(rows_of(inputs)) > 1
        if is_full and not after_backward:
            raise torch.OutOfMemoryError(CUDA)
        loss = RIGHT_STEP(trainer, model, inputs, num_items)
        if is_full:
            raise torch.OutOfMemoryError(CUDA)
        return loss

    return lambda: setattr(SFTTrainer, "training_step", step)


CASES: dict[str, tuple[dict[str, Any], Callable[[], None] | None]] = {
    "alone": ({"launch": {"num_processes": 1}, "training": SETTINGS | {"per_device_train_batch_size": 4}}, None),
    "forward": ({"health": {"on_oom": "halve_batch"}}, runs_out(after_backward=False)),
    "backward": ({"health": {"on_oom": "halve_batch"}}, runs_out(after_backward=True)),
    "packed alone": ({"training": PACKED | SETTINGS, "launch": {"num_processes": 1}}, None),
    "packed": (
        {"training": PACKED | SETTINGS | {"per_device_train_batch_size": 1}, "health": {"on_oom": "halve_batch"}},
        runs_out(after_backward=True),
    ),
    "stop": ({}, runs_out(after_backward=True)),
}


def main(directory: Path, base: Path) -> None:
    """Each case in a directory of its own."""
    ended: dict[str, list[Any]] = {}
    for name, (sections, arm) in CASES.items():
        place = directory / name
        place.mkdir()
        loaded = small_recipe(place, base, **{"training": SETTINGS, "launch": {"num_processes": 2}} | sections)
        children = session(loaded, "new", arm=arm)
        ended[name] = [[child.wait(timeout=60), child.said()] for child in children]
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
