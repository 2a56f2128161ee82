"""What the shipped quickstarts take here, and on a CPU that has no more than AVX2 and so no bfloat16.

    python benchmarks/any_cpu.py [--threads 2] [--rounds 1] [--quick]

ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA make torch use any x86 as an AVX2 one. First whole commands, each in a
process and with a cache of its own, the seconds from start to end: the quickstart as shipped, here and with AVX2 alone;
there also with float32 written out, and its QLoRA twin. Then useful tokens/s in float32 with AVX2 alone on the packed
rows of speed.py: lorafit, a bare loop and TRL, in turn; lorafit's losses are compared with TRL's. With --quick the
commands stop after 40 steps. What else the machine does counts for less in seconds that the process computed: both
tables say these beside those of the clock.

Wanted with AVX2 and two threads, if nothing else runs: the quickstart in at most 120 s and as fast as in float32, the
QLoRA twin in at most 180 s, at least 2.5 times the bare loop and 3.5 times TRL. What is missed ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from speed import in_its_own_process, rows_per_step, write_base, write_rows

RECIPES = Path(__file__).parent.parent / "recipes"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
CPUS: dict[str, dict[str, str]] = {"as it is": {}, "AVX2 alone": AVX2}
QUICKSTART, WRITTEN, QLORA = "quickstart", "quickstart, float32 written", "quickstart-qlora"
COMMANDS = {
    QUICKSTART: ("quickstart.yaml",),
    WRITTEN: ("quickstart.yaml", "--set", "model.dtype=float32"),
    QLORA: ("quickstart-qlora.yaml",),
}
TIMED = (("as it is", QUICKSTART), *(("AVX2 alone", name) for name in COMMANDS))
SIDES = ("lorafit", "bare-loop", "trl-packed")
QUICK_STEPS, STEPS = 40, 10


@dataclass(frozen=True)
class Command:
    """One `lorafit train`, from its start to its end."""

    seconds: float
    cpu_seconds: float
    """Of all its threads."""
    tokens_per_second: float
    loss: float
    """Held-out, at the end."""
    types: str
    """The lines that say which types it takes."""


def trained(recipe: str, *settings: str, cpu: Mapping[str, str], threads: int, steps: int | None) -> Command:
    """The recipe, trained in a process of its own and thrown away."""
    few = ("--set", f"training.max_steps={steps}") if steps else ()
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        environment = {"OMP_NUM_THREADS": str(threads), "LORAFIT_CACHE": f"{name}/cache", "HF_HUB_OFFLINE": "1"}
        started, computed = time.perf_counter(), _computed_by_children()
        done = subprocess.run(
            [sys.executable, "-m", "lorafit", "train", RECIPES / recipe, *settings, *few, "--output-dir", run],
            env=os.environ | environment | cpu,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        seconds, cpu_seconds = time.perf_counter() - started, _computed_by_children() - computed
        if done.returncode:
            sys.exit(f"{recipe} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        facts = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    said = [line for line in done.stderr.splitlines() if line.startswith(("base weights in", "bfloat16 autocast"))]
    types = "; ".join(line.partition(":")[0] for line in said)
    return Command(seconds, cpu_seconds, facts["tokens_per_second"], facts["eval_loss_after"], types)


def _computed_by_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def whole_commands(*, threads: int, steps: int | None) -> dict[tuple[str, str], Command]:
    """By CPU and name."""
    titles = f"{'seconds':>7} {'computed':>9} {'tokens/s':>9} {'held-out loss':>14}"
    print(f"{'CPU':<11} {'lorafit train':<28} {titles}   types")
    found = {}
    for cpu, name in TIMED:
        one = found[cpu, name] = trained(*COMMANDS[name], cpu=CPUS[cpu], threads=threads, steps=steps)
        figures = f"{one.seconds:>7.1f} {one.cpu_seconds:>9.1f} {one.tokens_per_second:>9,.0f} {one.loss:>14.4f}"
        print(f"{cpu:<11} {name:<28} {figures}   {one.types}", flush=True)
    return found


def beside_others(*, threads: int, rounds: int) -> dict[str, float]:
    """How many times as fast as each other side lorafit is in float32: the medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_base(work / "base")
        write_rows(work / "rows.jsonl", count=rows_per_step(work, packed=False) * (STEPS + 2))
        for _ in range(rounds):
            keys = {"steps": STEPS, "threads": threads, "bf16": False, "cpu": AVX2}
            measured = {side: in_its_own_process(work, side=side, **keys) for side in SIDES}
            refuse_other_losses(measured["lorafit"]["losses"], measured["trl-packed"]["losses"])
            for side, one in measured.items():
                found[side].append(one)
    titles = f"{'tokens/s':>9}   lorafit is x as fast   x by what is computed"
    print(f"{'AVX2 alone':<11} {'float32, packed rows':<28} {titles}")
    ratios = {}
    for side, theirs in found.items():
        ratio = ratios[side] = times_as_fast(found["lorafit"], theirs, unit="tokens_per_second")
        computed = times_as_fast(found["lorafit"], theirs, unit="tokens_per_cpu_second")
        speed = statistics.median(one["tokens_per_second"] for one in theirs)
        print(f"{'':<11} {side:<28} {speed:>9,.0f} {ratio:>22.2f} {computed:>23.2f}", flush=True)
    return ratios


def times_as_fast(ours: list[dict[str, float]], theirs: list[dict[str, float]], *, unit: str) -> float:
    """The median over the rounds."""
    return statistics.median(one[unit] / other[unit] for one, other in zip(ours, theirs, strict=True))


def refuse_other_losses(ours: list[float], theirs: list[float]) -> None:
    """Both take the same batches in the same order: what is faster must not compute something else."""
    apart = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    if apart > 1e-3:
        sys.exit(f"losses of lorafit and TRL on the same batches differ by {apart:.1e}")


def main() -> int:
    """Print both tables and what is wanted of them; 1 where something is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="of tokens/s beside the others")
    parser.add_argument(
        "--quick", action="store_true", help=f"whole commands of {QUICK_STEPS} steps, which decide less"
    )
    chosen = parser.parse_args()
    commands = whole_commands(threads=chosen.threads, steps=QUICK_STEPS if chosen.quick else None)
    ratios = beside_others(threads=chosen.threads, rounds=chosen.rounds)
    of_avx2 = {name: commands["AVX2 alone", name] for name in COMMANDS}
    shipped, written = of_avx2[QUICKSTART], of_avx2[WRITTEN]
    wanted = (
        ("quickstart, seconds", shipped.seconds, "at most", 120.0),
        ("quickstart-qlora, seconds", of_avx2[QLORA].seconds, "at most", 180.0),
        ("quickstart / float32 written", shipped.tokens_per_second / written.tokens_per_second, "at least", 0.95),
        ("lorafit / bare loop", ratios["bare-loop"], "at least", 2.5),
        ("lorafit / TRL packed", ratios["trl-packed"], "at least", 3.5),
    )
    missed = 0
    for name, figure, bound, goal in wanted:
        is_reached = figure <= goal if bound == "at most" else figure >= goal
        missed += not is_reached
        print(f"{name:<40} {figure:>9.2f}   wanted: {bound} {goal:g}{'' if is_reached else '   missed'}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
