"""Packages that a recipe asks for and this Python lacks. They are looked for, not imported. No torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

from lorafit.errors import Problem
from lorafit.recipe import LoadedRecipe


def missing_packages(loaded: LoadedRecipe) -> Iterator[Problem]:
    """One problem for each package that the recipe needs besides lorafit's own, and that is not installed."""
    recipe = loaded.recipe
    strategy = recipe.launch.strategy
    if strategy in ("zero2", "zero3") and not has_package("deepspeed"):
        yield loaded.problem("launch.strategy", f"{strategy} needs the package deepspeed; install it, or write fsdp2")
    if recipe.model.attn_implementation == "flash_attention_2" and not has_package("flash_attn"):
        yield loaded.problem("model.attn_implementation", "needs the package flash_attn; install it, or write sdpa")
    for logger in recipe.training.report_to:  # each is called as its package is
        if not has_package(logger):
            yield loaded.problem("training.report_to", f"{logger} is not installed; pip install {logger}")


def has_package(name: str) -> bool:
    """Whether a package can be imported, as far as can be seen without."""
    return name in sys.modules or importlib.util.find_spec(name) is not None
