"""A task is a few files: a second one is added to a copy of lorafit, whose recipe then trains and is measured."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import lorafit
from support import ROOT
from support.tiny import sums, write_jsonl

PACKAGE = Path(lorafit.__file__).parent
ADDED = {
    "toy_lm.py": "tasks/toy_lm.py",
    "toy_lm_rows.py": "tasks/toy_lm_rows.py",
    "toy_lm_trainer.py": "tasks/toy_lm_trainer.py",
    "toy.py": "recipe/sections/toy.py",
}
NAMES = """\
TASKS: Mapping[TaskName, Task] = {
    "toy_lm": Task(
        name="toy_lm",
        model=MODEL_KINDS["CAUSAL_LM"],
        bases=BaseModels("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", re.compile("ForMaskedLM$"), ("says something", "a toy")),
        arguments=LibraryArguments("transformers.TrainingArguments", frozenset()),
        unit="bits",
        counted="word",
        figure=Figure("toyness", lambda loss: 2 * loss),
        guess="ln of all words",
        pipeline_tag="toy-generation",
        tag="toys",
    ),
"""
RECIPE = """\
class ToyRecipe(Recipe):
    TASK = TASKS["toy_lm"]

    training: ToySection = ToySection()


RECIPES: """
CHANGED = {
    "tasks/names.py": {
        'Literal["causal_lm"]': 'Literal["causal_lm", "toy_lm"]',
        "TASKS: Mapping[TaskName, Task] = {\n": NAMES,
    },
    "recipe/recipe.py": {
        "import Names\n": "import Names\nfrom lorafit.recipe.sections.toy import ToySection\n",
        "RECIPES: ": RECIPE,
        "in (CausalLmRecipe,)": "in (CausalLmRecipe, ToyRecipe)",
    },
}
MOST_FILES = 6


def with_the_second_task(directory: Path) -> Path:
    """A copy of lorafit that has it."""
    copy = directory / "lorafit"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in ADDED.items():
        assert not (copy / target).exists()
        shutil.copy(Path(__file__).parent / "second_task" / source, copy / target)
    for name, changes in CHANGED.items():
        text = (copy / name).read_text(encoding="utf-8")
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (copy / name).write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Any]:
    """What a program that uses it has seen."""
    directory = tmp_path_factory.mktemp("second")
    write_jsonl(directory / "train.jsonl", sums(24))
    write_jsonl(directory / "eval.jsonl", sums(8, first=100))
    recipe = {
        "task": "toy_lm",
        "output_dir": str(directory / "run"),
        "model": {"model_name_or_path": str(tiny_base)},
        "lora": {"r": 4},
        "data": {"train": [{"path": "train.jsonl"}], "eval": [{"path": "eval.jsonl"}]},
        "training": {"label_smoothing_factor": 0.1, "max_steps": 3, "learning_rate": 5e-3, "bf16": False},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    program = [sys.executable, str(Path(__file__).parent / "second_task" / "use_it.py"), str(directory / "recipe.yaml")]
    tree = with_the_second_task(directory / "tree")
    paths = os.pathsep.join((str(tree), str(ROOT / "scripts")))
    done = subprocess.run(
        program, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # some libraries print there
    return told


def test_a_second_task_is_at_most_six_files() -> None:
    assert len(ADDED) + len(CHANGED) <= MOST_FILES


def test_it_trains_its_own_rows_with_its_own_trainer_and_levers_and_passes_the_self_test(found: dict[str, Any]) -> None:
    assert found["recipe"] == "ToyRecipe"
    trained = found["trained"]
    assert trained["outcome"] == "finished" and trained["steps"] == 3
    assert trained["tokens"] > 24 * 20
    assert trained["eval_loss_after"] < trained["eval_loss_before"]
    (data,) = (line for line in found["said"] if line.startswith("data: "))
    assert "100 % trained" in data and data.count("100 % trained") == 2
    assert any(line.startswith("fused LoRA on") for line in found["said"])
    assert not any(line.startswith("loss of answers alone") for line in found["said"])
    assert any(line.startswith("self-test passed") for line in found["said"])


def test_it_is_measured_and_reported_by_its_own_names(found: dict[str, Any]) -> None:
    assert list(found["eval"]["adapter"]) == ["loss"]
    assert found["eval"]["verdict"].startswith("adapter better by") and " bits [" in found["eval"]["verdict"]
    assert "loss (bits)" in found["eval_table"] and "perplexity" not in found["eval_table"] + found["train_table"]
    assert f"{2 * found['trained']['eval_loss_after']:.2f} after" in found["train_table"]
    assert "pipeline_tag: toy-generation" in found["card"] and "toyness" in found["card"]
    assert math.isfinite(found["eval"]["adapter"]["loss"])


def test_its_recipe_has_the_keys_of_its_own_library_class_and_no_others(found: dict[str, Any]) -> None:
    packing, extra, misspelt = (said for (said,) in found["refused"].values())
    assert packing == "--set: training.packing: not a key of training with task: toy_lm; it is one with task: causal_lm"
    assert extra == "--set: training.extra.max_length: training has this key itself; write training.max_length"
    assert misspelt.endswith(
        "training.label_smoothing_facter: not a key of training; did you mean label_smoothing_factor?"
    )
    (said,) = found["refused of the default"]
    assert "training.label_smoothing_factor: not a key of training; it costs a second forward pass" in said


def test_a_recipe_that_is_laid_over_its_own_has_its_task(found: dict[str, Any]) -> None:
    assert found["laid over"] == {"seed": 7, "label_smoothing_factor": 0.1}


def test_its_keys_are_in_the_reference_beneath_its_name(found: dict[str, Any]) -> None:
    headings = [line for line in found["reference"].splitlines() if line.startswith("## training")]
    assert headings == ["## training (task: causal_lm)", "## training (task: toy_lm)"]
    assert "### training (task: toy_lm).label_smoothing_factor" in found["reference"]


def test_its_keys_are_in_the_schema_where_its_name_is_written(found: dict[str, Any]) -> None:
    sections = {
        rule["if"]["properties"]["task"]["const"]: (
            rule["if"]["required"],
            rule["then"]["properties"]["training"]["$ref"].rpartition("/")[2],
        )
        for rule in found["schema"]["allOf"]
    }
    assert sections == {"causal_lm": ([], "SFTSection"), "toy_lm": (["task"], "ToySection")}
    own, default = (set(found["schema"]["$defs"][name]["properties"]) for name in ("ToySection", "SFTSection"))
    assert own - default == {"label_smoothing_factor"} and default - own == {"packing", "loss_type"}
    assert found["schema"]["$defs"]["ToySection"]["properties"]["label_smoothing_factor"]["description"]
    assert found["schema"]["properties"]["training"] == {}
