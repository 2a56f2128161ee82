"""What this CPU takes for the shipped quickstarts, and what one takes that has no more than AVX2 and so no bfloat16.

    python benchmarks/any_cpu.py [--threads 2] [--rounds 1] [--quick]

ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA make torch use any x86 as an AVX2 one. First whole commands, each in a
process and with a cache of its own, the seconds from start to end: the quickstart as shipped, the same with float32
written out, and its QLoRA twin. Then useful tokens/s in float32 on the packed rows of speed.py: lorafit, a bare loop
and TRL, in turn; lorafit's losses are compared with TRL's. With --quick the commands stop after 40 steps.

Wanted with AVX2 and two threads, if nothing else runs: the quickstart in at most 120 s and as fast as in float32, the
QLoRA twin in at most 180 s, at least 2.5 times the bare loop and 3.5 times TRL. What is missed ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
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
CPUS: dict[str, dict[str, str]] = {
    "as it is": {},
    "AVX2 alone": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
COMMANDS = {
    "quickstart": ("quickstart.yaml",),
    "quickstart, float32 written": ("quickstart.yaml", "--set", "model.dtype=float32"),
    "quickstart-qlora": ("quickstart-qlora.yaml",),
}
SIDES = ("lorafit", "bare-loop", "trl-packed")
QUICK_STEPS, STEPS = 40, 10


@dataclass(frozen=True)
class Command:
    """One `lorafit train`, from its start to its end."""

    seconds: float
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
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "lorafit", "train", RECIPES / recipe, *settings, *few, "--output-dir", run],
            env=os.environ | environment | cpu,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"{recipe} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        facts = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    said = [line for line in done.stderr.splitlines() if line.startswith(("base weights in", "bfloat16 autocast"))]
    types = "; ".join(line.partition(":")[0] for line in said)
    return Command(seconds, facts["tokens_per_second"], facts["eval_loss_after"], types)


def whole_commands(*, threads: int, steps: int | None) -> dict[tuple[str, str], Command]:
    """Every command on every CPU."""
    print(f"{'CPU':<11} {'lorafit train':<28} {'seconds':>7} {'tokens/s':>9} {'held-out loss':>14}   types")
    found = {}
    for name, command in COMMANDS.items():
        for cpu, narrowed in CPUS.items():
            one = found[cpu, name] = trained(*command, cpu=narrowed, threads=threads, steps=steps)
            figures = f"{one.seconds:>7.1f} {one.tokens_per_second:>9,.0f} {one.loss:>14.4f}"
            print(f"{cpu:<11} {name:<28} {figures}   {one.types}", flush=True)
    return found


def beside_others(*, threads: int, rounds: int) -> dict[tuple[str, str], float]:
    """How many times as fast as each other side lorafit is in float32: the medians over the rounds."""
    found: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_base(work / "base")
        write_rows(work / "rows.jsonl", count=rows_per_step(work, packed=False) * (STEPS + 2))
        for _ in range(rounds):
            for cpu, narrowed in CPUS.items():
                keys = {"steps": STEPS, "threads": threads, "bf16": False, "cpu": narrowed}
                measured = {side: in_its_own_process(work, side=side, **keys) for side in SIDES}
                refuse_other_losses(measured["lorafit"]["losses"], measured["trl-packed"]["losses"])
                for side, one in measured.items():
                    found.setdefault((cpu, side), []).append(one["tokens_per_second"])
    print(f"{'CPU':<11} {'float32, packed rows':<28} {'tokens/s':>9}   lorafit is x as fast")
    ratios = {}
    for (cpu, side), speeds in found.items():
        pairs = zip(found[cpu, "lorafit"], speeds, strict=True)
        ratio = ratios[cpu, side] = statistics.median(ours / theirs for ours, theirs in pairs)
        print(f"{cpu:<11} {side:<28} {statistics.median(speeds):>9,.0f} {ratio:>22.2f}", flush=True)
    return ratios


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
    shipped, written = of_avx2["quickstart"], of_avx2["quickstart, float32 written"]
    wanted = (
        ("quickstart, seconds", shipped.seconds, "at most", 120.0),
        ("quickstart-qlora, seconds", of_avx2["quickstart-qlora"].seconds, "at most", 180.0),
        ("quickstart / float32 written", shipped.tokens_per_second / written.tokens_per_second, "at least", 0.95),
        ("lorafit / bare loop", ratios["AVX2 alone", "bare-loop"], "at least", 2.5),
        ("lorafit / TRL packed", ratios["AVX2 alone", "trl-packed"], "at least", 3.5),
    )
    missed = 0
    for name, figure, bound, goal in wanted:
        is_reached = figure <= goal if bound == "at most" else figure >= goal
        missed += not is_reached
        print(f"{name:<40} {figure:>9.2f}   wanted: {bound} {goal:g}{'' if is_reached else '   missed'}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
