"""`lorafit plan`: asks a process of its own what a recipe takes in memory, time and disk."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorafit.errors import LorafitError
from lorafit.planning.answer import Plan
from lorafit.planning.gpus import Gpu
from lorafit.recipe import LoadedRecipe


@dataclass(frozen=True)
class Question:
    """What is to be planned."""

    loaded: LoadedRecipe
    gpu: Gpu
    count: int
    """GPUs."""
    model_shape: str | None = None
    """A shipped shape, instead of the recipe's model."""


class PlanningFailed(Exception):
    """The process that plans ended without an answer: a bug, with its traceback."""


def ask(question: Question) -> Plan:
    """The answer of a fresh process. Raises the LorafitError that it ends with, and PlanningFailed for a bug in it."""
    with tempfile.TemporaryDirectory(prefix="lorafit-plan-") as directory:
        asked, answered = Path(directory, "question"), Path(directory, "answer")
        asked.write_bytes(pickle.dumps(question))
        command = [sys.executable, "-m", "lorafit.planning.job", str(asked), str(answered)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode or not answered.is_file():
            raise PlanningFailed(done.stderr.strip() or f"it ended with {done.returncode}")
        answer = pickle.loads(answered.read_bytes())
    if isinstance(answer, LorafitError):
        raise answer
    return answer
