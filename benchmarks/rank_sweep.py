"""Whether `lorafit rank-sweep` finds what training every rank in full finds, and for how many tokens.

    OMP_NUM_THREADS=1 python benchmarks/rank_sweep.py [--data DIR] [--out DIR] [--only CASE] [--quick]

Three tasks with two seeds each and one case that overfits, on the CPU with the quickstart's base model and real text:
the docstrings that come with the quickstart; with --data a directory that holds gsm8k_train.jsonl, gsm8k_test.jsonl
(https://github.com/openai/grade-school-math) and code_alpaca_2k.json (2,000 rows of CodeAlpaca) two of the tasks are
those. Each case is swept, and then swept again with --exhaustive in the same directory, which trains the ranks that the
sweep left out; the tokens of the sweep are those of the first alone. Held to: the rank that the sweep names is the
exhaustive one, or its adapter's loss is within eps of that one's, in every case; the sweep trains at most 0.6 of the
tokens in every case, and 0.4 in the median. Killed, it goes on where it was.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorafit.lines import heard
from lorafit.preflight import this_machine
from lorafit.recipe import LoadedRecipe, load
from lorafit.recipe.recipe_yaml import dump
from lorafit.sweep.keys import known, seeds_of
from lorafit.sweep.search import END, compare
from lorafit.sweep.study import Study
from lorafit.sweep.sweep import FACTS, JOURNAL, rank_sweep, study_name
from lorafit.sweep.sweep_result import SweepResult

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes/quickstart"
RANKS = [1, 2, 4, 8, 12, 16, 24, 32]
MOST, USUAL = 0.6, 0.4
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One task with one seed, swept both ways."""

    name: str
    seed: int
    chosen: int
    decided_by: str
    truth: int
    equal_or_within_eps: bool
    difference: float
    """Nats per token by which the sweep's adapter is worse than that of the exhaustive rank."""
    low: float
    high: float
    eps: float
    is_monotone: bool
    share: float
    """Tokens trained by the sweep, of those that training every rank in full takes."""
    tokens: int
    losses: dict[int, float]
    """Of every rank, trained in full."""
    seconds: float


def sources(task: str, data: Path | None) -> dict[str, Any]:
    """The `data` section of a task."""
    docs = {"path": str(QUICKSTART / "train.jsonl"), "format": "prompt_completion"}
    held = {"path": str(QUICKSTART / "eval.jsonl"), "format": "prompt_completion", "limit": 256}
    swapped = {"columns": {"prompt": "completion", "completion": "prompt"}}
    match task:
        case "docs":
            return {"train": [docs], "eval": [held]}
        case "overfitting":
            return {"train": [docs | {"limit": 64}], "eval": [held]}
        case "names":
            return {"train": [docs | swapped], "eval": [held | swapped]}
        case "all text":
            return {"train": [docs], "eval": [held], "train_on": "all"}
    assert data is not None
    if task == "gsm8k":
        # This tokenizer knows little but docstrings: question and answer together are longer than is quick.
        columns = {"format": "text", "columns": {"text": "question"}}
        rows = {"path": str(data / "gsm8k_train.jsonl"), "limit": 2000} | columns
        held = {"path": str(data / "gsm8k_test.jsonl"), "limit": 160} | columns
        return {"train": [rows], "eval": [held], "train_on": "all", "over_length": "truncate"}
    rows = {"path": str(data / "code_alpaca_2k.json"), "format": "alpaca"}
    return {"train": [rows], "eval_fraction": 0.07, "over_length": "truncate", "max_lost_rows": 0.5}


TRAINING = {
    "docs": {"max_steps": 48, "learning_rate": 3e-3},
    "names": {"max_steps": 48, "learning_rate": 3e-3},
    "all text": {"max_steps": 48, "learning_rate": 3e-3},
    "gsm8k": {"max_steps": 48, "learning_rate": 3e-3},
    "code": {"max_steps": 48, "learning_rate": 3e-3},
    "overfitting": {"max_steps": 90, "learning_rate": 5e-3},
}
LORA: dict[str, dict[str, int]] = {
    "gsm8k": {"lora_alpha": 16},
    "names": {"lora_alpha": 16},
    "code": {"lora_alpha": 8},
    "all text": {"lora_alpha": 8},
}
SWEEP: dict[str, dict[str, Any]] = {
    "gsm8k": {"alpha": "fixed", "eps": 0.02},
    "names": {"alpha": "fixed", "eps": 0.02},
    "code": {"alpha": "rslora"},
    "all text": {"alpha": "rslora"},
}
"""Each policy for alpha, and eps both chosen by itself and given; what is not here is as a recipe has it."""


def recipe(task: str, *, seed: int, data: Path | None, out: Path, quick: bool) -> LoadedRecipe:
    """The recipe of one case."""
    training = {
        "max_length": 128,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "group_by_length",
        "seed": seed,
        **TRAINING[task],
    }
    if quick:
        training["max_steps"] = 6
    text = {
        "output_dir": str(out),
        "model": {"model_name_or_path": str(QUICKSTART / "base"), "dtype": "float32"},
        "data": sources(task, data),
        "training": training,
        "checkpoints": {"every": "50%"},
        "lora": LORA.get(task, {}),
        "rank_sweep": {"ranks": RANKS[:3] if quick else RANKS, **SWEEP.get(task, {})},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(dump(text), encoding="utf-8")
    return load(file)


def say(line: str) -> None:
    """On stderr at once."""
    print(f"  {line}", file=sys.stderr, flush=True)


def swept(loaded: LoadedRecipe, *, exhaustive: bool, cache: Path) -> SweepResult:
    """One sweep, its lines on stderr."""
    section = loaded.recipe.rank_sweep.model_copy(update={"exhaustive": exhaustive})
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"rank_sweep": section}))
    with heard(say):
        return rank_sweep(loaded, storage=None, cache_dir=cache)


def case(task: str, *, seed: int, data: Path | None, out: Path, quick: bool) -> Case:
    """Sweep, then train what is left, and compare."""
    started = time.monotonic()
    loaded = recipe(task, seed=seed, data=data, out=out / f"{task.replace(' ', '-')}-{seed}", quick=quick)
    first = loaded.output_dir() / "first.json"
    if not first.is_file():
        first.write_text(json.dumps(asdict(swept(loaded, exhaustive=False, cache=out / "cache"))), encoding="utf-8")
    found = json.loads(first.read_text(encoding="utf-8"))
    truth = swept(loaded, exhaustive=True, cache=out / "cache")
    row = next(row for row in found["trials"] if row["rank"] == found["chosen_rank"])
    study = Study(str(loaded.output_dir() / JOURNAL), study_name(json.loads((loaded.output_dir() / FACTS).read_text())))
    losses = known(loaded.recipe.rank_sweep, seeds_of(loaded), study.outcomes())
    is_cut = row["decided_by"] == "truncated"
    chosen = losses.truncated[found["chosen_rank"]] if is_cut else losses.direct[found["chosen_rank"], END]
    held = compare(losses.direct[truth.chosen_rank, END], chosen, eps=loaded.recipe.rank_sweep.eps)
    return Case(
        name=task,
        seed=seed,
        chosen=found["chosen_rank"],
        decided_by=row["decided_by"],
        truth=truth.chosen_rank,
        equal_or_within_eps=found["chosen_rank"] == truth.chosen_rank or held.difference.mean <= held.eps,
        difference=held.difference.mean,
        low=held.difference.low,
        high=held.difference.high,
        eps=held.eps,
        is_monotone=truth.is_monotone,
        share=found["tokens_trained"] / truth.tokens_trained,
        tokens=found["tokens_trained"],
        losses={row.rank: row.loss for row in truth.trials if row.loss is not None},
        seconds=round(time.monotonic() - started, 1),
    )


def table(cases: list[Case]) -> str:
    """Markdown."""
    ranks = list(cases[0].losses)
    head = ["task", "seed", "sweep", "exhaustive", "equal, or worse by [95 %]", "eps", "tokens", "monotone"]
    lines = [head + [f"loss r={rank}" for rank in ranks]]
    lines.append(["---"] * len(lines[0]))
    for one in cases:
        worse = "equal" if one.chosen == one.truth else f"{one.difference:+.4f} [{one.low:+.4f}, {one.high:+.4f}]"
        if not one.equal_or_within_eps:
            worse += " MISSED"
        cells = [one.name, one.seed, f"{one.chosen} ({one.decided_by})", one.truth, worse, f"{one.eps:.4f}"]
        cells += [f"{one.share:.2f}", "yes" if one.is_monotone else "no"]
        lines.append([str(cell) for cell in cells] + [f"{loss:.4f}" for loss in one.losses.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run the cases and print the table; exit 1 where a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    out = chosen.out or Path(tempfile.mkdtemp(prefix="lorafit-sweeps-"))
    tasks = ["docs", "gsm8k", "code"] if chosen.data else ["docs", "names", "all text"]
    pairs = [(task, seed) for task in tasks for seed in range(1, chosen.seeds + 1)] + [("overfitting", 1)]
    cases = []
    for task, seed in pairs:
        if chosen.only in (None, task):
            say(f"{task}, seed {seed}")
            cases.append(case(task, seed=seed, data=chosen.data, out=out, quick=chosen.quick))
            say(table(cases[-1:]))
    shares = [one.share for one in cases]
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "optuna")}
    print(table(cases))
    print(f"\ntokens of the sweep: at most {max(shares):.2f}, median {statistics.median(shares):.2f} of exhaustive")
    print(", ".join(f"{name} {of}" for name, of in packages.items()), f"Python {platform.python_version()}", sep=", ")
    if chosen.quick or chosen.only:
        return
    RESULTS.mkdir(exist_ok=True)
    name = "rank_sweep" if chosen.data else "rank_sweep_quickstart"
    facts = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/rank_sweep.py" + (" --data DIR" if chosen.data else ""),
        "date": date.today().isoformat(),
        "device": this_machine().name,
        "threads": torch.get_num_threads(),
        "versions": packages,
        "cases": [asdict(one) for one in cases],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if max(shares) > MOST or statistics.median(shares) > USUAL or not all(one.equal_or_within_eps for one in cases):
        sys.exit("a promise does not hold")


if __name__ == "__main__":
    main()
