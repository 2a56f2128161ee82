"""A run goes on in more or fewer processes than it was begun in, with the same sequences in each step."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from lorafit.errors import LorafitError, RunDirError
from lorafit.lines import heard
from lorafit.recipe import LoadedRecipe, load
from lorafit.training.checkpoints import Checkpoint
from lorafit.training.must_match import SEQUENCES, divided_anew, kept_keys, refuse_changes
from lorafit.training.train import run_training
from support.forked import EVALUATED, Child, Crash, CrashAfter, base_model, recipe
from support.runs import cache_of

pytestmark = pytest.mark.xdist_group("training other_processes")  # its fixtures cost too much to be made by each worker


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("processes") / "base")


def train_in(loaded: LoadedRecipe, count: int, *, begin: Any, crash_after: int = 10**6) -> str:
    """In so many forked processes; what the first said."""
    lines = loaded.path.parent / f"{begin}.txt"

    def say(line: str) -> None:
        with lines.open("a") as file:
            file.write(f"{line}\n")

    def work() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # of tests that ran before this was forked
        is_first = os.environ.get("RANK", "0") == "0"
        with suppress(Crash), heard(say) if is_first else nullcontext():
            run_training(
                loaded,
                cache_dir=cache_of(loaded.path.parent),
                begin=begin,
                watchers=[CrashAfter(crash_after)],
            )

    port = str(20000 + os.getpid() % 20000)
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    children = [
        Child(
            work,
            log=loaded.path.parent / f"{begin}.{rank}.log",
            environment=together | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {},
        )
        for rank in range(count)
    ]
    assert [child.wait() for child in children] == [0] * count
    return lines.read_text()


def losses(loaded: LoadedRecipe) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (loaded.output_dir() / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "eval_loss", "grad_norm", "lr", "tokens")
    return [(line["step"], name, line[name]) for line in lines for name in names if name in line]


@pytest.mark.parametrize(
    ("before", "after", "shares"),
    [
        (2, 1, "2 per device x 2 accumulated x 1 process"),
        (1, 2, "2 per device x 1 accumulated x 2 processes"),
        pytest.param(2, 4, "1 per device x 1 accumulated x 4 processes", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_in_other_processes_to_the_same_losses(
    before: int, after: int, shares: str, base: Path, tmp_path: Path
) -> None:
    training = EVALUATED | {"per_device_train_batch_size": 4 // before, "logging_steps": 1}
    whole = recipe(tmp_path / "whole", base, training=training)
    train_in(whole, before, begin="new")
    broken_off = recipe(tmp_path / "broken off", base, training=training)
    train_in(broken_off, before, begin="new", crash_after=7)
    said = train_in(broken_off, after, begin="resume")
    count = f"{after} process{'es' * (after > 1)} instead of {before}"
    goes_on = f"goes on after step 6, from checkpoints/checkpoint-6, in {count}, with 4 sequences per step as before"
    assert f"resume: {goes_on}" in said.splitlines()
    assert f"4 sequences per step = {shares}" in said.splitlines()
    ours, theirs = losses(broken_off), losses(whole)
    assert [place[:2] for place in ours] == [place[:2] for place in theirs]
    assert [place[2] for place in ours] == pytest.approx([place[2] for place in theirs], abs=1e-6, rel=1e-6)
    manifest = json.loads((broken_off.output_dir() / "manifest.json").read_text())
    assert (manifest["world_size"], manifest["outcome"]) == (after, "finished")
    assert goes_on == manifest["resumes"][-1]["message"]
    # The recipe stays as it was written: what goes on from here is the same run.
    assert load(broken_off.output_dir() / "recipe.yaml").recipe.training == whole.recipe.training


def checkpoint_of(loaded: LoadedRecipe, processes: int, **more: Any) -> Checkpoint:
    facts = {"recipe": kept_keys(loaded.recipe.model_dump(mode="json")), "processes": processes}
    return Checkpoint(loaded.output_dir() / "checkpoints/checkpoint-6", 6, None, 1.0, facts | more)


def divided(loaded: LoadedRecipe, checkpoint: Checkpoint, processes: int) -> tuple[int, int]:
    training = divided_anew(loaded, checkpoint, processes=processes).recipe.training
    return training.per_device_train_batch_size, training.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("written", "before", "after", "expected"),
    [
        ((4, 2), 2, 2, (4, 2)),
        ((4, 2), 2, 1, (4, 4)),
        ((4, 2), 2, 4, (4, 1)),
        ((4, 2), 2, 8, (2, 1)),
        ((4, 1), 3, 2, (3, 2)),
        ((5, 1), 4, 2, (5, 2)),
        ((5, 1), 4, 10, (2, 1)),
    ],
)
def test_the_sequences_of_a_step_are_divided_anew(
    written: tuple[int, int], before: int, after: int, expected: tuple[int, int], tmp_path: Path
) -> None:
    shares = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), written, strict=True))
    loaded = recipe(tmp_path, tmp_path / "base", training=shares)
    assert divided(loaded, checkpoint_of(loaded, before), after) == expected


def test_processes_that_cannot_share_a_step_are_refused_with_those_that_can(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, tmp_path / "base", training={"per_device_train_batch_size": 2})
    with pytest.raises(RunDirError, match=r"processes: 2 -> 3: they cannot share the 4 sequences .* go on in 1, 2, 4"):
        divided_anew(loaded, checkpoint_of(loaded, 2), processes=3)


def test_a_batch_that_was_changed_on_purpose_is_taken_if_it_comes_to_the_same(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, tmp_path / "base", training={"per_device_train_batch_size": 2})
    begun = checkpoint_of(loaded, 2, **{SEQUENCES: 4})
    same = load(loaded.path, overrides=["training.per_device_train_batch_size=4"])
    assert divided(same, begun, 1) == (4, 1)
    now = {"recipe": kept_keys(same.recipe.model_dump(mode="json")), "processes": 1, SEQUENCES: 4}
    refuse_changes(same, begun, now=now)
    with pytest.raises(LorafitError, match="per_device_train_batch_size: 2 -> 4"):
        refuse_changes(same, begun, now=now | {SEQUENCES: 8, "processes": 2})
    in_parts = replace(begun, facts=dict(begun.facts) | {"distribution": "ZeRO-2"})
    with pytest.raises(LorafitError, match="processes: 2 -> 1"):
        refuse_changes(same, in_parts, now=now)
