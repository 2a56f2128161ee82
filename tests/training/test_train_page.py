"""One page reads as a run: `lorafit/training/train.py` stays one screen in the trade's words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from lorafit import training
from lorafit.training import train

PAGE = ast.parse(Path(train.__file__).read_text("utf-8"))
ROOM = Path(training.__path__[0])
LINES, IMPORTS = 60, 12
ALOUD = (
    *("prepare_run", "model_with_adapter", "task_trainer", "self_test_once"),
    *("train_by", "verified_adapter", "save_adapter", "finish"),
)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_the_page_is_one_screen() -> None:
    sizes = {one.name: one.end_lineno - one.body[0].end_lineno for one in functions(PAGE)}  # type: ignore[operator]
    assert 20 < sizes["run_training"] <= LINES
    assert max(sizes.values()) == sizes["run_training"]
    imports = [node for node in ast.walk(PAGE) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = {node.module for node in imports if isinstance(node, ast.ImportFrom) and "lorafit" in (node.module or "")}
    assert 5 < len(ours) <= IMPORTS
    assert all(node in PAGE.body for node in imports), "an import that is hidden in a function"


def test_it_is_read_aloud_in_order_data_model_trainer_checks_train_verify_write() -> None:
    (page,) = (one for one in functions(PAGE) if one.name == "run_training")
    calls = sorted((node for node in ast.walk(page) if isinstance(node, ast.Call)), key=lambda call: call.lineno)
    names = [ast.unparse(call.func).rpartition(".")[2] for call in calls]
    assert [name for name in names if name in ALOUD] == list(ALOUD)


def test_what_is_prepared_has_one_reader() -> None:
    readers = [
        f"{file.name}: {one.name}"
        for file in sorted(ROOM.rglob("*.py"))
        for one in functions(ast.parse(file.read_text("utf-8")))
        for argument in (*one.args.args, *one.args.kwonlyargs)
        if argument.annotation is not None and re.search(r"\bPrepared\b", ast.unparse(argument.annotation))
    ]
    assert readers == []
    calls = [node for node in ast.walk(PAGE) if isinstance(node, ast.Call)]
    handed_on = [
        *(part for call in calls for part in call.args),
        *(key.value for call in calls for key in call.keywords),
    ]
    names = [part.id for part in handed_on if isinstance(part, ast.Name)]
    assert "loaded" in names and "prepared" not in names
