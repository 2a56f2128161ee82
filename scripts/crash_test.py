"""Kill runs, damage their checkpoints, and see that `--resume` still ends with the adapter of an undisturbed run.

    OMP_NUM_THREADS=1 python scripts/crash_test.py [--kills 50] [--deaths all] [--writers all] [--damages all]
        [--settings all]

Kills are kill -9 at random moments, each run killed twice. Deaths are one in every write, flush, rename and removal
below the run directory, enumerated through a library that is preloaded (needs `cc`); those in a flush or rename also
with all that was not flushed lost. Damages are each file of a checkpoint removed, cut in half or with one bit turned.
Each setting is a run killed at a random moment. All on a tiny model in float32 on the CPU, compared by the hash of the
adapter's bytes, in about a quarter of an hour on one core. Writers are the other commands that write, with deaths as
above: what each writes is then the old, the new, or not there, and the same command called again ends as if nothing had
been and leaves no stage. All deaths of all writers take hours: most are the thousand of a rank-sweep.

A table, a JSON; exit code 1 when one differs.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
SHIM = "LORAFIT_DEATHS"
KINDS = {"w": "write", "f": "flush", "r": "rename", "m": "directory", "u": "removal"}


def preload_deaths() -> None:
    """Become this script again with the library that counts calls."""
    built = Path(tempfile.mkdtemp(prefix="lorafit-crash-")) / "deaths.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, TESTS / "support/deaths.c", "-ldl"], check=True)
    os.environ |= {"LD_PRELOAD": str(built), SHIM: str(built)}
    os.execv(sys.executable, [sys.executable, *sys.argv])


def quiet_libraries() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(TESTS))
    from transformers.utils import logging

    logging.set_verbosity_error()


class Trial:
    """What one disturbance came to."""

    def __init__(self, kind: str, what: str, *, problem: str) -> None:
        self.kind, self.what, self.problem = kind, what, problem


class Crashes:
    """All of them, on one base model in one directory."""

    def __init__(self, directory: Path) -> None:
        from support import forked

        self.forked = forked
        self.directory = directory
        self.base = forked.base_model(directory / "base")
        self._count = 0
        self._undisturbed: dict[str, tuple[str, list[dict[str, Any]], Path, float]] = {}
        gc.collect()
        gc.freeze()  # else every child copies the pages that the collector touches

    def recipe(self, name: str, **changes: Any) -> Any:
        """In a directory of its own."""
        self._count += 1
        sections = {**self.forked.SETTINGS[name], **changes}
        return self.forked.recipe(self.directory / f"run-{self._count}", self.base, **sections)

    def undisturbed(self, name: str, **changes: Any) -> tuple[str, list[dict[str, Any]], Path, float]:
        """Hash of the adapter, lines of metrics, run directory and seconds."""
        key = name + repr(changes)
        if key not in self._undisturbed:
            loaded, began = self.recipe(name, **changes), time.monotonic()
            found = self.forked.run_to_end(loaded, "new")
            run = loaded.output_dir()
            self._undisturbed[key] = (found, metrics(run), run, time.monotonic() - began)
        return self._undisturbed[key]

    def problem(self, loaded: Any, name: str, **changes: Any) -> str:
        """What is wrong with a run that was disturbed, once it has gone on to its end; empty when nothing is."""
        expected, lines, _, _ = self.undisturbed(name, **changes)
        try:
            found = self.forked.run_to_end(loaded, "resume")
        except AssertionError as error:
            return f"did not end: {str(error).strip().splitlines()[-1]}"
        if found != expected:
            return "the adapter differs"
        if metrics(loaded.output_dir()) != lines:
            return "metrics.jsonl differs"
        shutil.rmtree(loaded.output_dir())
        return ""

    def kills(self, count: int) -> Iterator[Trial]:
        """kill -9, twice a run, at moments spread over all of a session: loading, training, saving, ending."""
        name, changes = "dropout", {"every": 1}
        seconds = self.undisturbed(name, **changes)[3]
        for _ in range(count):
            loaded = self.recipe(name, **changes)
            moments = [random.uniform(0, seconds), random.uniform(0, seconds)]
            for moment, begin in zip(moments, ("new", "resume"), strict=True):
                self._kill(loaded, begin, after=moment)
            what = ", ".join(f"{moment:.2f} s" for moment in moments)
            yield Trial("kill", what, problem=self.problem(loaded, name, **changes))

    def _kill(self, loaded: Any, begin: Any, *, after: float) -> None:
        children = self.forked.session(loaded, begin)
        time.sleep(after)
        for child in children:
            child.kill()
        for child in children:
            child.wait()

    def deaths(self, limit: int | None) -> Iterator[Trial]:
        """One inside each call that changes something below the run directory, in a run with three checkpoints."""
        name, changes = "dropout", {"every": 3}
        library = ctypes.CDLL(os.environ[SHIM])
        library.deaths_log.restype = ctypes.c_char_p

        def session(loaded: Any, number: int, *, power: bool) -> Any:
            run = str(loaded.output_dir()).encode()
            (child,) = self.forked.session(loaded, "new", arm=lambda: library.deaths_arm(run, number, int(power)))
            return child

        counting = self.recipe(name, **changes)
        log = counting.path.parent / "calls"

        def count() -> None:
            library.deaths_arm(str(counting.output_dir()).encode(), 0, 0)
            self.forked.train_in(counting, "new")
            log.write_bytes(library.deaths_log())

        assert self.forked.Child(count, log=log.with_suffix(".log")).wait() == 0
        calls = log.read_text()
        deaths = [(number, kind, False) for number, kind in enumerate(calls, start=1)]
        deaths += [(number, kind, True) for number, kind in enumerate(calls, start=1) if kind in "fr"]
        for number, kind, power in deaths if limit is None else random.sample(deaths, min(limit, len(deaths))):
            loaded = self.recipe(name, **changes)
            code = session(loaded, number, power=power).wait()
            what = f"in call {number} of {len(calls)}, a {KINDS[kind]}{', power lost' if power else ''}"
            problem = self.problem(loaded, name, **changes) if code == -9 else f"did not die but ended with {code}"
            yield Trial(f"death in a {KINDS[kind]}{', power lost' if power else ''}", what, problem=problem)

    def writers(self, limit: int | None) -> Iterator[Trial]:
        """Each command that writes, dying in each of its calls that change something, then called again."""
        from support.writers import WRITERS, Deaths, made

        root = self.directory / "writers"
        root.mkdir()
        deaths = Deaths(made(root))
        library = ctypes.CDLL(os.environ[SHIM])
        library.deaths_log.restype = ctypes.c_char_p
        for writer in WRITERS:
            undisturbed = deaths.copy(writer)
            log = root / "calls"

            def count(writer: Any = writer, directory: Path = undisturbed, log: Path = log) -> None:
                library.deaths_arm(str(directory).encode(), 0, 0)
                writer.write(directory)
                log.write_bytes(library.deaths_log())

            deaths.alone(undisturbed, count)
            old, new, calls = writer.state(deaths.ready(writer)), writer.state(undisturbed), log.read_text()
            assert new and new != old, f"{writer.name} changed nothing"
            points = [(number, kind, False) for number, kind in enumerate(calls, start=1)]
            points += [(number, kind, True) for number, kind in enumerate(calls, start=1) if kind in "fr"]
            for number, kind, power in points if limit is None else random.sample(points, min(limit, len(points))):
                directory = deaths.copy(writer)

                def die(
                    writer: Any = writer, directory: Path = directory, number: int = number, power: bool = power
                ) -> None:
                    library.deaths_arm(str(directory).encode(), number, int(power))
                    writer.write(directory)

                try:
                    deaths.alone(directory, die, code=-9)
                    problem = deaths.problem(writer, directory, old=old, new=new)
                except AssertionError as error:
                    problem = f"did not die but {str(error).splitlines()[0]}"
                what = f"in call {number} of {len(calls)}, a {KINDS[kind]}{', power lost' if power else ''}"
                yield Trial(f"writer: {writer.name}", what, problem=problem)

    def damages(self, limit: int | None) -> Iterator[Trial]:
        """One in each file of the newest checkpoint of a run that was killed before its end."""
        for name in ("dropout", "adalora"):
            _, _, run, _ = self.undisturbed(name)
            newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.partition("-")[2]))
            files = sorted(path.name for path in newest.iterdir())
            if name == "adalora":  # the rest is the same
                files = ["rank_allocation.safetensors"]
            chosen = [(file, damage) for file in files for damage in (removed, halved, one_bit_turned)]
            for file, damage in chosen if limit is None else random.sample(chosen, min(limit, len(chosen))):
                loaded = self.recipe(name)
                stopped_after(run, loaded.output_dir())
                damage(loaded.output_dir() / "checkpoints" / newest.name / file)
                what = f"{file} {damage.__name__.replace('_', ' ')}"
                problem = self._quarantined(loaded, name, newest.name, file)
                yield Trial(f"file {damage.__name__.replace('_', ' ')}", what, problem=problem)

    def _quarantined(self, loaded: Any, name: str, checkpoint: str, file: str) -> str:
        run = loaded.output_dir()
        expected, lines, _, _ = self.undisturbed(name)
        try:
            found = self.forked.run_to_end(loaded, "resume")
        except AssertionError as error:
            return f"did not end: {str(error).strip().splitlines()[-1]}"
        said = (loaded.path.parent / "session.log").read_text()
        named = [line for line in said.splitlines() if line.startswith(f"warning: {checkpoint} was set aside")]
        if len(named) != 1 or file not in named[0] or not (run / "quarantine" / checkpoint).is_dir():
            return f"not named: {named}"
        shutil.rmtree(run)
        return "" if found == expected and lines else "the adapter differs"

    def settings(self, names: list[str]) -> Iterator[Trial]:
        """Each killed once, at a random moment after its first checkpoint."""
        for name in names:
            loaded = self.recipe(name)
            self.undisturbed(name)
            children = self.forked.session(loaded, "new")
            first = loaded.output_dir() / "checkpoints"
            while not list(first.glob("checkpoint-*")) and not (loaded.output_dir() / "adapter").exists():
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.5))
            for child in children:
                child.kill()
            for child in children:
                child.wait()
            yield Trial(f"setting: {name}", name, problem=self.problem(loaded, name))


def metrics(run: Path) -> list[dict[str, Any]]:
    """Every line, without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def stopped_after(run: Path, target: Path) -> None:
    """A copy of a finished run as it was before its end."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "adapter")
    (target / "manifest.json").unlink()


def removed(path: Path) -> None:
    path.unlink()


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def one_bit_turned(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def table(trials: list[Trial], seconds: float) -> str:
    """How many of each kind, and how many ended with the same bytes."""
    kinds = list(dict.fromkeys(trial.kind for trial in trials))
    rows = [("disturbance", "runs", "equal")]
    for kind in kinds:
        those = [trial for trial in trials if trial.kind == kind]
        rows.append((kind, str(len(those)), str(sum(not trial.problem for trial in those))))
    rows.append(("all", str(len(trials)), str(sum(not trial.problem for trial in trials))))
    width = max(len(row[0]) for row in rows)
    body = "\n".join(f"{name:<{width}}  {count:>5}  {equal:>5}" for name, count, equal in rows)
    return f"{body}\n{seconds:.0f} s"


def all_or_number(text: str) -> int | None:
    return None if text == "all" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--deaths", type=all_or_number, default=None, help="a number, or all")
    parser.add_argument("--writers", type=all_or_number, default=None, help="deaths of each, a number or all")
    parser.add_argument("--damages", type=all_or_number, default=None, help="a number, or all")
    parser.add_argument("--settings", default="all", help="names separated by commas, or all")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if (asked.deaths != 0 or asked.writers != 0) and SHIM not in os.environ:
        preload_deaths()
    quiet_libraries()
    random.seed(asked.seed)
    began, trials = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="lorafit-crash-") as directory:
        crashes = Crashes(Path(directory))
        names = [name for name in asked.settings.split(",") if name]
        names = list(crashes.forked.SETTINGS) if names == ["all"] else names
        for some in (
            crashes.writers(asked.writers) if asked.writers != 0 else (),
            crashes.kills(asked.kills),
            crashes.deaths(asked.deaths) if asked.deaths != 0 else (),
            crashes.damages(asked.damages) if asked.damages != 0 else (),
            crashes.settings(names),
        ):
            for trial in some:
                trials.append(trial)
                print(f"{trial.kind}: {trial.what}: {trial.problem or 'equal'}", file=sys.stderr, flush=True)
    print(table(trials, time.monotonic() - began))
    failed = [f"{trial.kind}: {trial.what}: {trial.problem}" for trial in trials if trial.problem]
    kinds = dict.fromkeys(trial.kind for trial in trials)
    counts = {kind: sum(trial.kind == kind for trial in trials) for kind in kinds}
    print(json.dumps({"runs": len(trials), "equal": len(trials) - len(failed), "kinds": counts, "failed": failed}))
    sys.exit(any(trial.problem for trial in trials))


if __name__ == "__main__":
    main()
