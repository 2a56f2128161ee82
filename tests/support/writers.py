"""Each command that writes, on a small copy of what it works on: for deaths in the midst of its writing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorafit.errors import RecipeError, RunDirError
from lorafit.evaluation.evaluate import evaluate
from lorafit.merging.combine import combine
from lorafit.merging.merge import merge
from lorafit.recipe import load
from lorafit.recipe.recipe_yaml import write_asked_for
from lorafit.recipe.starter import write_recipe
from lorafit.report.page.write_page import write_report
from lorafit.storage.run_dir import RunDir
from lorafit.storage.stage import STAGE_SUFFIX
from lorafit.sweep.sweep import rank_sweep
from lorafit.training.inputs import read_inputs
from support import forked
from support.runs import small_recipe
from support.tiny import sums, write_jsonl

State = dict[str, Any]


@dataclass(frozen=True)
class Writer:
    """A command, and what it writes."""

    name: str
    write: Callable[[Path], Any]
    """In a directory that holds all it needs; called again it goes on, or finds its work done."""
    targets: tuple[str, ...]
    """What appears whole or not at all, as patterns below that directory."""
    before: Callable[[Path], Any] = lambda directory: None
    """Brings the directory into the state that the command finds."""

    def state(self, directory: Path) -> State:
        """The targets that are there, with all that they hold; without times."""
        found = [path for pattern in self.targets for path in sorted(directory.glob(pattern))]
        whole = [path for path in found if not path.name.endswith(STAGE_SUFFIX)]
        return {path.relative_to(directory).as_posix(): _content(path, str(directory).encode()) for path in whole}


def made(root: Path) -> Path:
    """A trained run with its rows in `root/made`, beside its base; copies of it must lie as deep."""
    base = forked.base_model(root / "base")
    directory = root / "made"
    directory.mkdir()
    loaded = small_recipe(directory, base)
    # In a process of its own: in one forked from a process that went backward torch waits for threads that are gone.
    child = forked.Child(lambda: forked.train_in(loaded, "new"), log=root / "made.log")
    assert child.wait() == 0, child.said()
    write_jsonl(directory / "more.jsonl", sums(20, first=100))
    recipe = yaml.safe_load((directory / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["training"]["max_steps"] = 6
    recipe["data"]["eval"] = [{"path": "more.jsonl"}]
    recipe |= {"lora": {}, "rank_sweep": {"ranks": [1, 2, 4], "budget": 1.0}}
    (directory / "sweep.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return directory


def _content(path: Path, place: bytes) -> Any:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {file.relative_to(path).as_posix(): _content(file, place) for file in files}
    content = path.read_bytes().replace(place, b"")
    try:
        return _without_times(json.loads(content)) if path.suffix == ".json" else content
    except ValueError:
        return content


def _without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_times(one) for one in value]
    if not isinstance(value, dict):
        return value
    times = ("second", "identity", "peak_memory")
    return {key: _without_times(one) for key, one in value.items() if not any(time in key for time in times)}


def _evaluate(directory: Path) -> None:
    evaluate(str(directory / "run"), cache_dir=directory / "cache")


def _merge(directory: Path) -> None:
    with suppress(RunDirError):  # there already
        merge(
            directory / "run", out=directory / "merged", dtype=None, max_shard_size="40KB", base=None, onto=None,
            verify=False, progress=lambda total: lambda done: None, cache_dir=None,
        )  # fmt: skip


def _combine(directory: Path) -> None:
    with suppress(RunDirError):  # there already
        combine(
            [(directory / "run/adapter", 0.5), (directory / "other", 0.25)], out=directory / "combined", method="cat",
            density=None, rank=None, seed=0, base=str(directory.parent / "base"), with_losses=False,
            cache_dir=None,
        )  # fmt: skip


def _prepare(directory: Path) -> None:
    read_inputs(load(directory / "recipe.yaml"), cache_dir=directory / "cache")


def _init(directory: Path) -> None:
    with suppress(RecipeError):  # there already
        write_recipe((directory / "recipe.yaml").read_text(encoding="utf-8"), directory / "new.yaml")


def _sweep(directory: Path) -> None:
    loaded = load(directory / "sweep.yaml", overrides=[f"output_dir={directory / 'swept'}"])
    rank_sweep(loaded, storage=None, cache_dir=directory / "cache")


def _swept_but_for_the_answer(directory: Path) -> None:
    _sweep(directory)
    for name in ("sweep.json", "best.yaml", "spectrum.json"):
        (directory / "swept" / name).unlink(missing_ok=True)


def _set_torn_events_aside(directory: Path) -> None:
    run = RunDir(directory / "run")
    run.set_torn_events_aside()


def _tear_an_event(directory: Path) -> None:
    with (directory / "run/events.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"kind": "half')


def _old(*names: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        for name in names:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text("old", encoding="utf-8")

    return write


WRITERS = (
    Writer("init", _init, ("new.yaml",)),
    Writer(
        "schema --output",
        lambda directory: write_asked_for(directory / "s.json", "[1]", option="--output", overwrite=True),
        ("s.json",),
        before=_old("s.json"),
    ),
    Writer(
        "manifest",
        lambda directory: RunDir(directory / "run").write_manifest({"outcome": "new"}),
        ("run/manifest.json",),
    ),
    Writer("events", _set_torn_events_aside, ("run/events.jsonl",), before=_tear_an_event),
    Writer(
        "report",
        lambda directory: write_report(directory / "run", out=None, rows=0),
        ("run/report.html", "run/plots/*"),
        before=_old("run/report.html", "run/plots/loss.svg"),
    ),
    Writer(
        "tokens",
        _prepare,
        ("cache/????????????????*",),
        before=lambda directory: shutil.rmtree(directory / "cache"),
    ),
    Writer("eval", _evaluate, ("run/eval.json",), before=_old("run/eval.json")),
    Writer("merge", _merge, ("merged",)),
    Writer(
        "combine",
        _combine,
        ("combined",),
        before=lambda directory: shutil.copytree(directory / "run/adapter", directory / "other"),
    ),
    Writer(
        "the answer of rank-sweep",
        _sweep,
        ("swept/sweep.json", "swept/best.yaml", "swept/spectrum.json"),
        before=_swept_but_for_the_answer,
    ),
    Writer("rank-sweep", _sweep, ("swept/sweep.json", "swept/best.yaml")),
)
"""Checkpoints and the adapter have deaths of their own: those of a whole run."""


class Deaths:
    """Copies of `made`, in which writers die."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._count = 0
        self._ready: dict[str, Path] = {}

    def ready(self, writer: Writer) -> Path:
        """A directory as the command finds it, made once."""
        if writer.name not in self._ready:
            directory = self._copy(self._source)
            self.alone(directory, lambda: writer.before(directory))
            self._ready[writer.name] = directory
        return self._ready[writer.name]

    def copy(self, writer: Writer) -> Path:
        """One more of these."""
        return self._copy(self.ready(writer))

    def _copy(self, source: Path) -> Path:
        self._count += 1
        directory = self._source.parent / f"copy-{self._count:06}"
        shutil.copytree(source, directory)
        (directory / "tmp").mkdir(exist_ok=True)
        return directory

    def alone(self, directory: Path, work: Callable[[], Any], *, code: int = 0) -> None:
        """In a process of its own, whose temporary files lie there, too. Raises AssertionError where it fails."""

        def placed() -> None:
            tempfile.tempdir = str(directory / "tmp")
            work()

        child = forked.Child(placed, log=directory.with_suffix(".log"))
        ended = child.wait()
        assert ended == code, f"ended with {ended}: {child.said()}"

    def problem(self, writer: Writer, directory: Path, *, old: State, new: State) -> str:
        """What is wrong where the writer died, then or once it was called again; empty if nothing is."""
        found = writer.state(directory)
        half = [name for name in old | new | found if not _is_whole(found.get(name), old.get(name), new.get(name))]
        if half:
            return f"not whole: {', '.join(half)}"
        try:
            self.alone(directory, lambda: writer.write(directory))
        except AssertionError as error:
            return f"does not go on: {str(error).strip().splitlines()[-1]}"
        if writer.state(directory) != new:
            return "ends with something else"
        left = [path.relative_to(directory).as_posix() for path in directory.rglob(f"*{STAGE_SUFFIX}")]
        shutil.rmtree(directory)
        return f"leaves {left[0]}" if left else ""


def _is_whole(found: Any, old: Any, new: Any) -> bool:
    """The old one, the new one, or none where there was none."""
    return found in (old, new) and (found is not None or old is None)
