"""Tasks: what a task is called stands in lorafit/tasks alone, and everything else takes it from there."""

from __future__ import annotations

import ast
import inspect
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

import peft
import pytest
import transformers
import trl

from lorafit.builders.architectures import task_problems
from lorafit.builders.auto_class import auto_class
from lorafit.data.encode import Encode
from lorafit.errors import RecipeError
from lorafit.planning.empty_base import empty_base
from lorafit.recipe import load
from lorafit.recipe.recipe import RECIPES
from lorafit.recipe.sections import ModelSection
from lorafit.tasks import DEFAULT_TASK, MODEL_KINDS, TASKS, Task, TaskName, model_kind
from lorafit.tasks.pages import Page, RowsPage, TrainerPage, page, rows_page, trainer_page
from support import ROOT

PACKAGE = ROOT / "lorafit"
ROOM = PACKAGE / "tasks"
RECIPE = PACKAGE / "recipe" / "recipe.py"
"""Says which class of `training` goes with each."""


@cache
def names() -> set[str]:
    """What tasks and the models of adapters are called."""
    kinds = [word for kind in MODEL_KINDS.values() for word in (kind.peft_type, kind.auto_class)]
    return {*kinds, *(word for task in TASKS.values() for word in own_names(task))}


def own_names(task: Task) -> set[str]:
    """What no other task is called."""
    return {task.name, task.bases.table, task.figure.name, task.pipeline_tag, task.arguments.name}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def mentions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name, wherever code says one: texts for people beside the code are left out."""
    beside = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in beside:
            said = node.value
        elif isinstance(node, ast.ImportFrom):
            said = " ".join([node.module or "", *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Attribute):
            said = node.attr
        else:
            continue
        yield from ((node.lineno, name) for name in names() if name in said)


def decides_by_task(node: ast.AST) -> bool:
    """`if recipe.task == "..."`, `task_type in ("...", )`, `match task`."""
    if isinstance(node, ast.Match):
        parts = [node.subject]
    elif isinstance(node, ast.Compare) and any(isinstance(one, ast.Constant) for one in ast.walk(node)):
        parts = [node.left, *node.comparators]
    else:
        return False
    words = [one.attr if isinstance(one, ast.Attribute) else getattr(one, "id", "") for one in parts]
    return bool({"task", "task_type", "peft_type"} & set(words))


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.AST]:
    found: dict[Path, ast.AST] = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
    assert len(found) > 250
    return found


def test_no_name_of_a_task_stands_outside_its_room(trees: dict[Path, ast.AST]) -> None:
    said = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in mentions(tree)
        if ROOM not in path.parents and (path, name) not in {(RECIPE, task) for task in TASKS}
    ]
    assert said == []


def test_nothing_outside_the_room_asks_which_task_it_is(trees: dict[Path, ast.AST]) -> None:
    asking = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"  # type: ignore[attr-defined]
        for path, tree in trees.items()
        if ROOM not in path.parents
        for node in ast.walk(tree)
        if decides_by_task(node)
    ]
    assert asking == []


def test_a_name_in_code_is_found_and_one_beside_it_is_not() -> None:
    code = '"""Of a causal_lm."""\nfrom transformers import AutoModelForCausalLM\nkind = {"task_type": "CAUSAL_LM"}\n'
    assert sorted(mentions(ast.parse(code))) == [(2, "AutoModelForCausalLM"), (3, "CAUSAL_LM")]
    decisions = 'a = recipe.task == "causal_lm"\nb = task_type in (None, "X")\nc = name == "task"\n'
    assert [node.lineno for node in ast.walk(ast.parse(decisions)) if decides_by_task(node)] == [1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_in_few_files(name: TaskName, trees: dict[Path, ast.AST]) -> None:
    own = own_names(TASKS[name])
    named = {path for path, tree in trees.items() if own & {word for _, word in mentions(tree)}}
    files = sorted(str(path.relative_to(PACKAGE)) for path in {*named, *(path for path in trees if name in path.stem)})
    assert 4 <= len(files) <= 6, files


def test_every_task_that_a_recipe_may_name_is_in_the_table() -> None:
    assert list(TASKS) == list(get_args(TaskName)) == [task.name for task in TASKS.values()]
    assert list(RECIPES) == list(TASKS)
    assert all(MODEL_KINDS[task.model.peft_type] is task.model for task in TASKS.values())


@pytest.mark.parametrize("name", TASKS)
def test_the_pages_of_a_task_hold_what_every_task_has(name: TaskName) -> None:
    for protocol, module in ((Page, page(name)), (TrainerPage, trainer_page(name))):
        functions = {key: value for key, value in vars(protocol).items() if inspect.isfunction(value) and key[0] != "_"}
        assert functions
        for key, function in functions.items():
            of_all = list(inspect.signature(function).parameters.values())[1:]
            of_this = inspect.signature(getattr(module, key)).parameters
            assert [(one.name, one.kind) for one in of_all] == [(one.name, one.kind) for one in of_this.values()], key
        assert all(hasattr(module, key) for key in protocol.__annotations__)
    assert [*RowsPage.__annotations__] == ["encode"]
    wanted = list(inspect.signature(Encode.__call__).parameters.values())[1:]
    encode = inspect.signature(rows_page(name).encode)
    assert [(one.name, one.kind) for one in wanted] == [(one.name, one.kind) for one in encode.parameters.values()]


def test_the_names_are_the_libraries_own() -> None:
    for kind in MODEL_KINDS.values():
        assert kind.peft_type in peft.TaskType.__members__
        assert auto_class(kind) is getattr(transformers, kind.auto_class)
    for task in TASKS.values():
        library, name = task.arguments.name.split(".")
        assert hasattr({"trl": trl, "transformers": transformers}[library], name)
        assert hasattr(transformers.models.auto.modeling_auto, task.bases.table)


def test_an_adapter_that_names_no_task_or_one_of_its_own_is_read_as_the_default() -> None:
    assert model_kind("SEQ_CLS") is MODEL_KINDS["SEQ_CLS"]
    assert model_kind(None) is model_kind("FEATURE_EXTRACTION") is DEFAULT_TASK.model


def test_the_names_come_without_the_libraries() -> None:
    code = (
        "import sys, lorafit.tasks; print(sorted({'torch', 'transformers', 'peft', 'trl', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_task_that_there_is_not_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("task: dpo\nmodel: {model_name_or_path: ./base}\ndata: {train: [{path: rows.jsonl}]}\n")
    with pytest.raises(RecipeError) as refused:
        load(path)
    (problem,) = refused.value.problems
    assert str(problem).startswith(f'{path}:1: task: "dpo" is not {" or ".join(TASKS)}')


def test_the_kind_of_model_decides_the_class_that_is_built_and_the_bases_that_are_taken(tiny_base: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_base)
    classifier = replace(DEFAULT_TASK, model=MODEL_KINDS["SEQ_CLS"])
    section = ModelSection(model_name_or_path=str(tiny_base))
    assert type(empty_base(section, None, config=config)).__name__ == "LlamaForCausalLM"
    assert type(empty_base(section, None, config=config, task=classifier)).__name__ == "LlamaForSequenceClassification"
    translator = replace(DEFAULT_TASK, model=MODEL_KINDS["SEQ_2_SEQ_LM"])
    assert list(task_problems(config.to_dict(), where="config.json")) == []
    assert len(list(task_problems(config.to_dict(), where="config.json", task=translator))) == 1


def test_a_guess_holds_every_token_for_equally_likely(tiny_base: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_base)
    assert page(DEFAULT_TASK.name).guessing(config) == math.log(config.vocab_size)
