"""Health of a run: faults put in on purpose, and runs that are healthy.

    python benchmarks/health.py [--quick] [--only faults|held-out|healthy]

Trains every case of health_cases.py as `lorafit train` would, on the quickstart's base and on shipped architectures in
miniature, with the default actions, and reads events.jsonl. A fault counts as noticed in time when a finding comes
within five logged steps of its onset and none before it, and as named right when the first finding is of a rule that
fits and names the cause put in. The onset is the step the fault is put in at; the first step at which the loss is 0.5
nats above its first, where a setting of the whole run is at fault; the first evaluation after the lowest held-out loss;
and the first step that the rule can judge at, where a run lacks something from the start (a plateau: 30 logged steps,
an adapter that does not move: 10). The held-out faults and seeds were tried after the thresholds were chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

from health_cases import FAULTS, HEALTHY, HELD_OUT, Case, Watched, watch
from transformers.utils import logging as transformers_logging

IN_TIME = 5


def watched(cases: Iterable[Case], *, directory: Path) -> Iterable[tuple[Watched, float]]:
    """Every case, and the seconds it took."""
    for index, case in enumerate(cases):
        started = time.monotonic()
        with contextlib.redirect_stderr(io.StringIO()):
            result = watch(case, directory / str(index), cache=directory / "cache")
        yield result, time.monotonic() - started


def print_faults(title: str, cases: Iterable[Case]) -> None:
    """One line for each fault, and the count."""
    print(f"\n{title:<48} {'onset':>5} {'said':>5} {'after':>5}  {'rule':<22} cause")
    noticed = right = count = 0
    with tempfile.TemporaryDirectory() as directory:
        for result, _ in watched(cases, directory=Path(directory)):
            first, delay = next(iter(result.events), None), result.delay()
            count += 1
            noticed += delay is not None and delay <= IN_TIME and not result.early()
            right += result.is_right()
            rule, said = (first["rule"], first["step"]) if first else ("-", "-")
            verdict = "right" if result.is_right() else "wrong" if first else "not noticed"
            after = "-" if delay is None else delay
            print(f"{result.case.name:<48} {result.onset():>5} {said:>5} {after:>5}  {rule:<22} {verdict}", flush=True)
    print(f"noticed within {IN_TIME} logged steps: {noticed} of {count}; cause named right: {right} of {count}")


def print_healthy(cases: Iterable[Case]) -> None:
    """One line for each healthy run, and the count of alarms."""
    print(f"\n{'healthy':<48} {'steps':>5} {'loss':>14} {'alarms':>6}  outcome")
    alarms = count = 0
    with tempfile.TemporaryDirectory() as directory:
        for result, _ in watched(cases, directory=Path(directory)):
            losses = [entry["loss"] for entry in result.metrics if "loss" in entry]
            steps = max((entry["step"] for entry in result.metrics), default=0)
            change = f"{losses[0]:.2f} -> {losses[-1]:.2f}" if losses else "-"
            count += 1
            alarms += len(result.events)
            print(
                f"{result.case.name:<48} {steps:>5} {change:>14} {len(result.events):>6}  {result.outcome}", flush=True
            )
    print(f"alarms: {alarms} in {count} healthy runs")


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every fifth case")
    parser.add_argument("--only", choices=("faults", "held-out", "healthy"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    every = 5 if arguments.quick else 1
    if arguments.only in (None, "faults"):
        print_faults("fault", FAULTS[::every])
    if arguments.only in (None, "held-out"):
        print_faults("held-out fault", HELD_OUT[::every])
    if arguments.only in (None, "healthy"):
        print_healthy(HEALTHY[::every])


if __name__ == "__main__":
    main()
