"""`import lorafit`: the commands as functions, which end no process, listen to no signal and print nothing."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import pkgutil
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import lorafit
from lorafit import errors
from lorafit.cli import app
from lorafit.launching.alone import refuse_several_processes
from support import ROOT
from support.runs import cache_of, small_recipe
from support.tiny import sums, write_jsonl

PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FUNCTIONS = {
    "load": ("recipe", "set"),
    "validate": ("recipe",),
    "train": ("recipe", "resume", "restart"),
    "evaluate": ("run", "data", "merged", "base", "tasks", "samples", "set"),
    "merge": ("run", "out", "dtype", "max_shard_size", "base", "onto", "verify"),
    "plan": ("recipe", "gpu", "count", "model_shape", "largest", "fix", "measure"),
    "rank_sweep": ("recipe", "storage"),
}
RESULTS = ("EvalResult", "LoadedRecipe", "MergeResult", "Plan", "SweepResult", "TrainResult", "Validation")


def in_a_thread(work: Callable[[], Any]) -> Any:
    """What `work` comes to where Python refuses to install a signal handler."""
    found: list[Any] = []
    broken: list[BaseException] = []

    def try_it() -> None:
        try:
            found.append(work())
        except BaseException as error:
            broken.append(error)

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    if broken:
        raise broken[0]
    return found[0]


def test_the_names_are_these() -> None:
    kinds = [
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert len(kinds) == 12
    assert lorafit.__all__ == sorted([*FUNCTIONS, *RESULTS, *kinds])
    assert {*lorafit.__all__} <= {*dir(lorafit)}
    assert all(getattr(lorafit, name).__name__ == name for name in (*FUNCTIONS, *RESULTS, *kinds))
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = lorafit.trian  # type: ignore[attr-defined]


def test_no_module_takes_the_place_of_a_name() -> None:
    """Importing a module sets its name in the package."""
    modules = {module.name for module in pkgutil.iter_modules(lorafit.__path__)}
    assert len(modules) > 20 and not modules & {*lorafit.__all__}


def test_the_keywords_are_options_of_the_commands() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, keywords in FUNCTIONS.items():
        assert (*inspect.signature(getattr(lorafit, name)).parameters,) == keywords
        command = commands[{"evaluate": "eval", "rank_sweep": "rank-sweep", "load": "validate"}.get(name, name)]
        options = {option.strip("-").replace("-", "_") for parameter in command.params for option in parameter.opts}
        assert {*keywords} <= options, name


def test_every_call_on_the_page_fits_its_function() -> None:
    calls = [node for block in BLOCKS for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    ours = [call for call in calls if ast.unparse(call.func).startswith("lorafit.")]
    assert len(ours) >= 7
    for call in ours:
        named = {keyword.arg or "": None for keyword in call.keywords}
        inspect.signature(getattr(lorafit, call.func.attr)).bind(*call.args, **named)  # type: ignore[attr-defined]
    assert [*re.findall(r"^\| `lorafit\.(\w+)`", PAGE, re.MULTILINE)] == [*FUNCTIONS]


def test_the_notebook_of_the_page_runs_in_a_thread(
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And leaves the handlers of the process, and its stdout, to who owns them."""
    (tmp_path / "recipes").mkdir()
    small_recipe(tmp_path, tiny_base, merge={"verify": False}).path.rename(tmp_path / "recipes/quickstart.yaml")
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).rename(tmp_path / "recipes" / name)
    write_jsonl(tmp_path / "recipes/train.jsonl", [*sums(24), *sums(3)])  # three of them twice
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFIT_CACHE", str(cache_of(tmp_path)))
    caplog.set_level(logging.INFO, "lorafit")
    heard = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    code = BLOCKS[0].replace('"training.max_steps": 20', '"training.max_steps": 3')
    assert code != BLOCKS[0]
    names: dict[str, Any] = {}
    in_a_thread(lambda: exec(compile(code, "docs/python.md", "exec"), names))
    assert heard == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    trained, compared, merged = (names[name] for name in ("trained", "compared", "merged"))
    assert (trained.outcome, trained.steps, trained.run) == ("finished", 3, "runs/notebook")
    assert trained.eval_loss_after < trained.eval_loss_before
    assert json.loads((tmp_path / "runs/notebook/eval.json").read_text()) == compared.as_dict()
    assert merged.out == "runs/notebook/merged" and (tmp_path / merged.out / "config.json").is_file()
    assert len(capsys.readouterr().out.splitlines()) == 4
    lines = {record.getMessage(): record.levelno for record in caplog.records if record.name.startswith("lorafit.")}
    assert any(line.startswith("step 0/3: held-out loss") for line, level in lines.items() if level == logging.INFO)
    assert any("duplicate" in line for line, level in lines.items() if level == logging.WARNING)
    assert not any("warning:" in line for line in lines)
    assert lorafit.train(names["recipe"], resume=True) == trained
    with pytest.raises(lorafit.RunDirError):
        lorafit.train(names["recipe"])


def test_without_logging_configured_nothing_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lorafit")
    assert any(isinstance(handler, logging.NullHandler) for handler in logger.handlers)
    logger.propagate = False  # pytest listens at the root
    try:
        logging.getLogger("lorafit.training.train").warning("x")
    finally:
        logger.propagate = True
    assert capfd.readouterr() == ("", "")


def test_a_recipe_is_checked_with_the_keys_that_are_set(tmp_path: Path, tiny_base: Path) -> None:
    path = small_recipe(tmp_path, tiny_base).path
    loaded = lorafit.load(str(path), set={"training.learning_rate": 1e-05, "lora.r": 8, "output_dir": tmp_path / "new"})
    assert (loaded.recipe.training.learning_rate, loaded.recipe.lora.r) == (1e-5, 8)
    assert loaded.output_dir() == tmp_path / "new"
    checked = lorafit.validate(loaded)
    assert checked.loaded is loaded and checked.as_dict() == lorafit.validate(checked.loaded).as_dict()
    assert lorafit.validate(path).numbers == checked.numbers
    with pytest.raises(lorafit.RecipeError) as caught:
        lorafit.load(path, set={"lora.rr": 8, "training.max_steps": 0})
    assert len(caught.value.problems) == 2 and "--set: lora.rr" in str(caught.value)
    (tmp_path / "train.jsonl").write_text("{\n")
    with pytest.raises(lorafit.DataError, match=r"train\.jsonl:1"):
        lorafit.validate(loaded)


@pytest.mark.parametrize(
    ("section", "gpus", "key", "said"),
    [
        ({"num_processes": 2}, 0, "num_processes", "2 processes are to train together"),
        ({}, 2, "num_processes", "2 processes are to train together"),
        ({"machines": 2}, 1, "machines", "2 machines are to train together"),
        ({"strategy": "fsdp2", "num_processes": 1}, 1, "strategy", "fsdp2 spreads a model over processes"),
    ],
)
def test_what_several_processes_train_is_left_to_the_command(
    tmp_path: Path, tiny_base: Path, section: dict[str, Any], gpus: int, key: str, said: str
) -> None:
    loaded = small_recipe(tmp_path, tiny_base, launch=section)
    with pytest.raises(lorafit.MachineError, match=said) as caught:
        refuse_several_processes(loaded, gpus=gpus, command="train")
    assert f"launch.{key}: " in str(caught.value)
    assert f"`lorafit train {loaded.path}`" in str(caught.value)


def test_one_process_trains_where_it_sees_several_gpus(tmp_path: Path, tiny_base: Path) -> None:
    # SFTConfig is told of one (training/arguments.py).
    refuse_several_processes(small_recipe(tmp_path, tiny_base, launch={"num_processes": 1}), gpus=2, command="train")


def test_train_and_rank_sweep_refuse_several_processes_and_create_nothing(tmp_path: Path, tiny_base: Path) -> None:
    loaded = lorafit.load(small_recipe(tmp_path, tiny_base).path, set={"launch.num_processes": 2})
    for function in (lorafit.train, lorafit.rank_sweep):
        with pytest.raises(lorafit.MachineError, match=r"--set: launch\.num_processes: 2 processes"):
            function(loaded)
    assert not (tmp_path / "run").exists()


class Interrupted(logging.Handler):
    """Ctrl-C while the first step is told of."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("step 1/3: loss"):
            raise KeyboardInterrupt


def test_an_interrupt_ends_a_run_that_goes_on_with_resume(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    monkeypatch.setenv("LORAFIT_CACHE", str(cache_of(tmp_path)))
    logger, interrupted = logging.getLogger("lorafit"), Interrupted()
    logger.addHandler(interrupted)
    monkeypatch.setattr(logger, "level", logging.INFO)
    try:
        with pytest.raises(lorafit.StopRequested, match="stopped on request after step 1 of 3"):
            lorafit.train(loaded)
    finally:
        logger.removeHandler(interrupted)
    assert lorafit.train(loaded, resume=True).steps == 3


def test_restart_goes_with_resume(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(lorafit.RecipeError, match="restart: goes with resume=True"):
        lorafit.train(small_recipe(tmp_path, tiny_base), restart=True)
