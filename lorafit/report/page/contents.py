"""What a run or a sweep left on disk, read without changing it; parts that are not there are empty."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorafit.errors import LorafitError, Problem, RecipeError, RunDirError
from lorafit.launching.child import Child, ChildFailed
from lorafit.recipe.yaml_reader import parse
from lorafit.storage.files import read_regular
from lorafit.storage.run_dir import LONGEST_LINE, RunDir
from lorafit.tasks import DEFAULT_TASK, TASKS, Task

MERGE_REPORT = "merge_report.json"
"""As `merging/` names it, beside the weights of a merged model."""

EXAMPLES_SECONDS = 120
MOST_PROBLEMS = 10

Facts = dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """Every part of a report, as its file has it."""

    path: Path
    manifest: Facts
    metrics: tuple[Facts, ...]
    events: tuple[Facts, ...]
    evaluation: Facts
    sweep: Facts
    spectrum: Any
    merges: tuple[tuple[str, Facts], ...]
    """Verified merged models: their directory, and what the verification found."""
    recipe: str
    notes: tuple[str, ...]
    """What could not be read and may be missed."""

    @cached_property
    def task(self) -> Task:
        """That of the recipe; the default one where there is no recipe to read."""
        try:
            name = parse(self.recipe, name="recipe").value["task"]
        except (RecipeError, LookupError, TypeError):
            return DEFAULT_TASK
        return next((task for task in TASKS.values() if task.name == name), DEFAULT_TASK)

    @property
    def is_sweep(self) -> bool:
        """A sweep of several trials, not one run."""
        return bool(self.sweep)


@dataclass(frozen=True)
class Examples:
    """A few rows as tokens, or the reason why there are none."""

    rows: tuple[Facts, ...]
    stop_tokens: tuple[str, ...]
    missing: str


def read_contents(path: Path) -> Contents:
    """Everything there is to report. Raises RunDirError for what is no run, and for what is broken in one."""
    if not path.is_dir():
        raise RunDirError("is not a directory; name the output_dir of a run", where=str(path))
    run, reader = RunDir(path), _Reader(path)
    contents = Contents(
        path=path,
        manifest=reader.object(run.manifest),
        metrics=tuple(reader.lines(run.metrics)),
        events=tuple(reader.lines(run.events)),
        evaluation=reader.object(path / "eval.json"),
        sweep=reader.object(path / "sweep.json"),
        spectrum=reader.value(path / "spectrum.json"),
        merges=tuple((file.parent.name, reader.object(file)) for file in sorted(path.glob(f"*/{MERGE_REPORT}"))),
        recipe=next((reader.text(file) for file in (run.recipe, path / "best.yaml") if file.is_file()), ""),
        notes=tuple(reader.notes),
    )
    if reader.problems:
        shown, more = reader.problems[:MOST_PROBLEMS], len(reader.problems) - MOST_PROBLEMS
        raise RunDirError([*shown, *([Problem(str(path), f"and {more:,} more like this")] if more > 0 else [])])
    if not (contents.manifest or contents.metrics or contents.evaluation or contents.sweep):
        if contents.recipe:
            raise RunDirError("no step is logged yet; report again when training has begun", where=str(path))
        raise RunDirError("holds no run and no sweep; name the output_dir of one", where=str(path))
    return contents


def read_examples(contents: Contents, *, rows: int) -> Examples:
    """The first rows of each side, read again in a process of their own when they are still those of the run."""
    if not contents.manifest.get("data") or rows == 0:
        return Examples((), (), "")
    try:
        shown = Child("lorafit.data.preview_job:examples", contents.path, rows).answer(seconds=EXAMPLES_SECONDS)
    except TimeoutError:
        return Examples((), (), f"reading the data took more than {EXAMPLES_SECONDS} seconds")
    except LorafitError as error:
        return Examples((), (), str(error.problems[0]).rpartition("\n")[2])
    except ChildFailed as error:
        return Examples((), (), error.reason)
    return Examples(tuple(shown["rows"]), tuple(shown["stop_tokens"]), "")


class _Reader:
    """Reads files and collects what is wrong with them."""

    def __init__(self, run: Path) -> None:
        self._run = run.resolve()
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def text(self, file: Path) -> str:
        """The text of a file; empty when there is none."""
        if not file.resolve().is_relative_to(self._run):
            message = "is a link out of the run, which is not followed: its text would stand on the page"
            self.problems.append(Problem(str(file), message))
            return ""
        try:
            return read_regular(file).decode("utf-8")
        except FileNotFoundError:
            return ""
        except UnicodeDecodeError:
            self.problems.append(Problem(str(file), "is not UTF-8; it is not as it was written"))
        except OSError as error:
            self.problems.append(Problem(str(file), f"cannot be read ({error.strerror})"))
        return ""

    def value(self, file: Path) -> Any:
        """What a JSON file holds; an empty object when there is none."""
        text = self.text(file)
        try:
            return json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            self.problems.append(Problem(f"{file}:{getattr(error, 'lineno', 1)}", f"is not JSON ({_reason(error)})"))
            return {}

    def object(self, file: Path) -> Facts:
        """The same where only an object will do."""
        value = self.value(file)
        if isinstance(value, dict):
            return value
        self.problems.append(Problem(f"{file}:1", "is not a JSON object; it is not as it was written"))
        return {}

    def lines(self, file: Path) -> Iterator[Facts]:
        """The objects of a file that has one a line. A last line without its end is one that is being written."""
        text = self.text(file)
        lines = text.split("\n")
        unfinished = lines.pop()
        for number, line in enumerate(lines, 1):
            if len(line) > LONGEST_LINE:
                message = f"has {len(line):,} characters, and no line that lorafit writes has as many; remove the line"
                self.problems.append(Problem(f"{file}:{number}", message))
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.problems.append(Problem(f"{file}:{number}", f"is not JSON ({_reason(error)}); remove the line"))
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield entry
            else:
                self.problems.append(Problem(f"{file}:{number}", "is no object with a step; remove the line"))
        if unfinished:
            self.notes.append(f"The last line of {file.name} is not whole and was left out.")


def _reason(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
