"""In a copy of lorafit that has the second task: refuse keys, train, measure. python use_it.py RECIPE"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import recipe_reference

from lorafit.errors import RecipeError
from lorafit.evaluation.evaluate import evaluate
from lorafit.lines import heard
from lorafit.recipe import load
from lorafit.recipe.schema import recipe_schema
from lorafit.report.evaluation import eval_table
from lorafit.report.tables import train_table
from lorafit.tasks import TASKS
from lorafit.training.train import train

WRONG = ("training.packing=true", "training.extra={max_length: 9}", "training.label_smoothing_facter=0.1")


def main(path: Path) -> dict[str, Any]:
    """All that the test looks at."""
    said: list[str] = []
    loaded = load(path)
    laid_over = path.with_name("over.yaml")
    laid_over.write_text(f"extends: {path.name}\ntraining: {{seed: 7}}\n", encoding="utf-8")
    with heard(said.append):
        trained = train(loaded, cache_dir=None)
        measured = evaluate(trained.run, cache_dir=None)
    return {
        "recipe": type(loaded.recipe).__name__,
        "refused": {key: refused(path, key) for key in WRONG},
        "laid over": load(laid_over).recipe.training.model_dump(include={"seed", "label_smoothing_factor"}),
        "reference": recipe_reference.page(),
        "refused of the default": refused(path, "task=causal_lm"),
        "schema": recipe_schema(),
        "said": said,
        "trained": asdict(trained),
        "train_table": train_table(trained, task=TASKS[loaded.recipe.task]),
        "eval": measured.as_dict(),
        "eval_table": eval_table(measured),
        "card": (Path(trained.adapter) / "README.md").read_text(encoding="utf-8"),
    }


def refused(path: Path, override: str) -> list[str]:
    """What is said of a recipe that is wrong with this."""
    try:
        load(path, overrides=[override])
    except RecipeError as error:
        return list(map(str, error.problems))
    return []


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1])), sys.stdout)
