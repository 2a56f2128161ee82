"""`lorafit train RECIPE --selftest`: all up to the first step, and nothing left of it but the mark in the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lorafit.recipe import LoadedRecipe
from lorafit.storage.stage import scratch
from lorafit.training.selftest import SelfTest, SelfTested
from lorafit.training.train import run_training


def self_test_only(loaded: LoadedRecipe, *, cache_dir: Path | None) -> SelfTest:
    """The self-test of a recipe, in one process, whether it has been passed before or not.

    Raises every error that the run could raise before its first step, and VerificationError.
    """
    launch = loaded.recipe.launch.model_copy(update={"num_processes": 1, "strategy": "ddp"})
    with scratch() as directory:
        recipe = loaded.recipe.model_copy(update={"launch": launch, "output_dir": str(directory / "run")})
        try:
            run_training(replace(loaded, recipe=recipe), cache_dir=cache_dir, only_self_test=True)
        except SelfTested as done:
            return done.tested
    raise AssertionError("a run that is only tried came to its end")
