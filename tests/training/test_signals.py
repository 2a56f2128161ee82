"""A request to stop ends a run at once where nothing is lost, else with a checkpoint of the step it is at."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafit.launching.signals import REQUESTS
from lorafit.training.checkpoints import newest_verified
from support.commands import Command, Starter
from support.runs import small_recipe
from support.tiny import sums, write_jsonl

pytestmark = pytest.mark.xdist_group("training signals")  # its fixtures cost too much to be made by each worker

ENDLESS = {"max_steps": 10**6}
ADAPTER = "adapter/adapter_model.safetensors"
NAMES = [number.name for number in REQUESTS]


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    one = Starter()
    yield one
    one.close()


def logged(directory: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    except FileNotFoundError:
        return []


def train(starter: Starter, directory: Path, base: Path, *words: str, **sections: Any) -> Command:
    keys = ("pause", "seconds", "nohup")
    chosen = {key: sections.pop(key) for key in keys if key in sections}
    path = small_recipe(directory, base, **sections).path
    return starter.start(directory / "streams", "train", str(path), "--quiet", *words, **chosen)


def in_training(directory: Path) -> bool:
    return sum("loss" in entry for entry in logged(directory)) > 2


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run" / "manifest.json").read_text("utf-8"))


def left(directory: Path) -> set[str]:
    return {path.name for path in (directory / "run").iterdir()}


PHASES = {
    "data preparation": "lorafit.training.inputs:prepare",
    "model load": "lorafit.training.load_model:load_base_model",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("phase", PHASES)
def test_before_training_a_request_ends_the_run_at_once_and_leaves_nothing(
    phase: str, name: str, starter: Starter, tmp_path: Path, tiny_base: Path
) -> None:
    command = train(starter, tmp_path, tiny_base, pause=PHASES[phase])
    command.paused()
    command.send(signal.Signals[name])
    ended = command.ended()
    assert (ended.code, ended.out, ended.err) == (75, "", "error: stopped on request; nothing was written\n")
    assert ended.seconds < 10, "less than one on an idle machine"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_while_training_a_request_saves_the_step_and_says_how_to_go_on(
    name: str, starter: Starter, tmp_path: Path, tiny_base: Path
) -> None:
    command = train(starter, tmp_path, tiny_base, training=ENDLESS)
    command.until(lambda: in_training(tmp_path))
    command.send(signal.Signals[name])
    ended = command.ended()
    newest = newest_verified(tmp_path / "run" / "checkpoints").newest
    assert newest is not None and newest.step >= logged(tmp_path)[-1]["step"] > 0
    go_on = f"go on with `lorafit train {tmp_path / 'recipe.yaml'} --quiet --resume`"
    message = f"stopped at {newest.step}/1000000; {go_on}"
    assert (ended.code, ended.out, ended.err) == (75, "", f"error: {tmp_path / 'run'}: {message}\n")
    assert ended.seconds < 10, "less than one on an idle machine"
    assert manifest(tmp_path)["outcome"] == message
    assert left(tmp_path) == {"recipe.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "checkpoints"}
    event = json.loads((tmp_path / "run" / "events.jsonl").read_text("utf-8").splitlines()[-1])
    assert (event["kind"], event["step"], event["message"]) == ("stopped", newest.step, message)


@pytest.mark.parametrize("name", NAMES)
def test_a_request_to_all_processes_of_a_run_leaves_those_that_load_batches_at_work(
    name: str, starter: Starter, tmp_path: Path, tiny_base: Path
) -> None:
    command = train(starter, tmp_path, tiny_base, training=ENDLESS | {"dataloader_num_workers": 2})
    command.until(lambda: in_training(tmp_path))
    command.send_to_all(signal.Signals[name])
    ended = command.ended()
    assert (ended.code, ended.out) == (75, ""), ended
    assert "stopped at" in ended.err


# Dropout draws random numbers; the evaluations, a batch a row, take long enough to be met.
WHOLE = {
    "lora": {"r": 4, "lora_dropout": 0.2},
    "training": {
        **{"max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        **{"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1},
    },
    "early_stopping": {"patience": 5},
}


def whole_recipe(directory: Path, base: Path) -> Path:
    directory.mkdir(exist_ok=True)
    path = small_recipe(directory, base, **WHOLE).path
    write_jsonl(directory / "eval.jsonl", sums(150, first=100))
    return path


@pytest.fixture(scope="module")
def undisturbed(starter: Starter, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run that nobody stopped."""
    directory = tmp_path_factory.mktemp("undisturbed")
    ended = starter.start(directory / "streams", "train", str(whole_recipe(directory, tiny_base))).ended()
    assert ended.code == 0, ended.err
    return directory


def figures(directory: Path) -> list[tuple[int, str, float]]:
    names = ("loss", "eval_loss", "grad_norm", "lr", "tokens", "eval_tokens")
    return [(entry["step"], name, entry[name]) for entry in logged(directory) for name in names if name in entry]


def assert_goes_on_to_the_same(starter: Starter, directory: Path, undisturbed: Path) -> None:
    again = starter.start(directory / "streams", "train", str(directory / "recipe.yaml"), "--resume").ended()
    assert again.code == 0, again.err
    assert (directory / "run" / ADAPTER).read_bytes() == (undisturbed / "run" / ADAPTER).read_bytes()
    assert figures(directory) == figures(undisturbed)


def has(directory: Path, *, step: int, figure: str) -> bool:
    return any(entry["step"] == step and figure in entry for entry in logged(directory))


@pytest.mark.parametrize(
    ("step", "name"),
    [
        pytest.param(step, name, marks=[] if kept else pytest.mark.slow)
        for step, row in {0: "SIGHUP", 3: "SIGTERM", 6: "SIGINT"}.items()
        for name in NAMES
        for kept in [name == row]
    ],
)
def test_an_evaluation_that_is_broken_off_is_done_by_the_run_that_goes_on(
    step: int, name: str, starter: Starter, tmp_path: Path, tiny_base: Path, undisturbed: Path
) -> None:
    command = starter.start(tmp_path / "streams", "train", str(whole_recipe(tmp_path, tiny_base)), "--quiet")
    begun = {0: lambda: (tmp_path / "run" / "manifest.json").exists()}
    command.until(begun.get(step, lambda: has(tmp_path, step=step, figure="loss")))
    command.send(signal.Signals[name])
    ended = command.ended()
    assert ended.code == 75, ended
    assert ended.seconds < 10, "less than one on an idle machine"
    kept = "; nothing was saved" if step == 0 else ""
    assert ended.err.startswith(f"error: {tmp_path / 'run'}: stopped at {step}/6{kept}; go on with `lorafit train ")
    assert not has(tmp_path, step=step, figure="eval_loss")
    newest = newest_verified(tmp_path / "run" / "checkpoints").newest
    assert (newest.step if newest else 0) == step
    assert_goes_on_to_the_same(starter, tmp_path, undisturbed)


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_a_run_that_was_stopped_between_two_steps_goes_on_to_the_same_bytes(
    name: str, starter: Starter, tmp_path: Path, tiny_base: Path, undisturbed: Path
) -> None:
    command = starter.start(tmp_path / "streams", "train", str(whole_recipe(tmp_path, tiny_base)), "--quiet")
    command.until(lambda: has(tmp_path, step=3, figure="eval_loss"))
    command.send(signal.Signals[name])
    ended = command.ended()
    assert ended.code == 75, ended
    assert not (tmp_path / "run" / "adapter").exists()
    assert_goes_on_to_the_same(starter, tmp_path, undisturbed)


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_an_adapter_that_is_being_written_is_finished(
    name: str, starter: Starter, tmp_path: Path, tiny_base: Path
) -> None:
    command = train(starter, tmp_path, tiny_base, pause="lorafit.training.save:write_adapter", seconds=0.5)
    command.paused()
    command.send(signal.Signals[name])
    assert command.ended().code == 0
    assert (tmp_path / "run" / ADAPTER).exists()
    assert manifest(tmp_path)["outcome"] == "finished"


def test_a_second_ctrl_c_leaves_at_once_and_the_run_can_go_on(
    starter: Starter, tmp_path: Path, tiny_base: Path, undisturbed: Path
) -> None:
    path = str(whole_recipe(tmp_path, tiny_base))
    command = starter.start(tmp_path / "streams", "train", path, pause="lorafit.training.checkpoints:commit")
    command.until(lambda: has(tmp_path, step=1, figure="loss"))
    command.send(signal.SIGINT)
    command.paused()
    command.send(signal.SIGINT)
    ended = command.ended()
    assert ended.code == 75
    assert ended.seconds < 5, "less than a tenth on an idle machine"
    said = "\nSIGINT: stopping at the end of this step; a second Ctrl-C leaves at once\n"
    assert said in ended.err
    assert ended.err.endswith("\nleft at once; the last checkpoint is what it was\n")
    assert_goes_on_to_the_same(starter, tmp_path, undisturbed)
    assert f"was in use by process {command.pid} on " in command.texts()[1]


def test_a_terminal_that_closes_does_not_stop_what_ignores_it(
    starter: Starter, tmp_path: Path, tiny_base: Path
) -> None:
    command = train(starter, tmp_path, tiny_base, training=ENDLESS, nohup=True)
    command.until(lambda: in_training(tmp_path))
    command.send(signal.SIGHUP)
    seen = len(logged(tmp_path))
    command.until(lambda: len(logged(tmp_path)) > seen + 5)
    command.send(signal.SIGTERM)
    assert command.ended().code == 75


def test_a_request_while_others_are_started_reaches_them_or_ends_the_start(
    starter: Starter, tmp_path: Path, tiny_base: Path
) -> None:
    """The process that starts others forgets who listens when it becomes the launcher: the request waits."""
    command = train(
        starter,
        tmp_path,
        tiny_base,
        launch={"num_processes": 2},
        pause="lorafit.launching.launch:replace_this_process",
        seconds=0.5,
    )
    command.paused()
    command.send(signal.SIGTERM)
    ended = command.ended()
    assert (ended.code, ended.err) == (75, "error: stopped on request; nothing was written\n")
    assert not (tmp_path / "run").exists()
