"""A lever is a value: a key of the recipe and a file of its name, and nothing else knows of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lorafit
from lorafit.lines import heard
from lorafit.recipe.sections import SpeedSection
from lorafit.speed import levers
from lorafit.speed.lever import Lever
from lorafit.tasks import causal_lm_trainer
from lorafit.training.train import run_training
from support.runs import small_recipe

STOOD_IN_FOR = {"varlen_attention": {"planning/cuda_emulation.py"}}
"""Whose kernel on CUDA `plan` stands in for."""


def test_a_lever_takes_two_files() -> None:
    package = Path(lorafit.__file__).parent
    texts = {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in package.rglob("*.py")}
    assert len(levers.LEVERS) == len(SpeedSection.model_fields) >= 4
    for key, lever in zip(SpeedSection.model_fields, levers.LEVERS, strict=True):
        assert lever.key == key
        knows = {name for name, text in texts.items() if key in text}
        assert knows - STOOD_IN_FOR.get(key, set()) == {"recipe/sections/speed.py", f"speed/{key}.py"}


def test_a_new_lever_reaches_the_trainer_of_the_run_and_of_its_self_test(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def engage(trainer: Any) -> str:
        seen.append(Path(trainer.args.output_dir).name)
        return ""

    new = Lever(key="answer_head", name="new lever", why_not=lambda *_: None, engage=engage, goes_on="trainer")
    refused = replace(new, name="other lever", why_not=lambda *_: "the moon is full")
    monkeypatch.setattr(causal_lm_trainer, "LEVERS", (new, refused))
    said: list[str] = []
    with heard(said.append):
        run_training(small_recipe(tmp_path, tiny_base), cache_dir=None)
    assert [line for line in said if "lever" in line] == ["new lever on", "other lever off: the moon is full"]
    assert len(seen) == 3 and seen.count("checkpoints") == 1, "once for the run, and for each division of the self-test"
