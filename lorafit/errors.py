"""Every error a user can cause, and the exit code it ends with.

    LorafitError
    ├── RecipeError        2   a recipe, or the command line that changes it
    ├── DataError          3   a data file, or rows that cannot be trained on
    ├── ModelError         4   the base model or its tokenizer
    ├── AdapterError       4   an adapter that does not fit its base
    ├── RunDirError        4   a run directory that is used, missing or not whole
    ├── MachineError       4   what this machine, or the launch, cannot do
    ├── VerificationError  5   the result is not what was promised
    ├── HealthStop         6   training went wrong (NaN, divergence)
    ├── DiskError         74   full or read-only
    └── StopRequested     75   stopped on request, resumable

Anything else that escapes is a bug and keeps its traceback (exit 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is (`file:line: key`, or a path), and what to type to mend it."""

    where: str
    message: str
    line: int = 0
    """Sort key inside one file; 0 when there is no line."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class LorafitError(Exception):
    """Base of all; carries every problem found, so that all are reported at once."""

    exit_code = 1

    def __init__(self, problems: str | Problem | Iterable[Problem], *, where: str = "") -> None:
        if isinstance(problems, str):
            problems = Problem(where, problems)
        if isinstance(problems, Problem):
            problems = (problems,)
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(LorafitError):
    """A recipe, or the command line that changes it, cannot be used as written."""

    exit_code = 2


class DataError(LorafitError):
    """A data file cannot be read, or its rows cannot be trained on."""

    exit_code = 3


class ModelError(LorafitError):
    """The base model or its tokenizer cannot be used."""

    exit_code = 4


class AdapterError(LorafitError):
    """An adapter does not fit its base model, or the recipe's `lora` section does not."""

    exit_code = 4


class RunDirError(LorafitError):
    """A run directory is used, missing or not whole."""

    exit_code = 4


class MachineError(LorafitError):
    """This machine, or the processes that were started on it, cannot do what was asked."""

    exit_code = 4


class VerificationError(LorafitError):
    """A result was checked and is not what was promised."""

    exit_code = 5


class HealthStop(LorafitError):
    """Training went wrong and was stopped."""

    exit_code = 6


class DiskError(LorafitError):
    """A disk is full or read-only."""

    exit_code = 74


class StopRequested(LorafitError):
    """Stopped on request; what was committed can be resumed."""

    exit_code = 75
