"""Packages that a recipe asks for and this Python lacks. They are looked for, not imported. No torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

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


COMPILER_MEND = "apt install gcc python3-dev, or set CC to a C compiler"


def missing_compiler() -> str | None:
    """What keeps Triton from building the launchers of its kernels on a GPU; None where nothing does.

    TRL's loss is a Triton kernel wherever Triton is installed. Triton compiles with CC, gcc or clang, against Python.h,
    at the first call: https://github.com/triton-lang/triton/blob/main/python/triton/runtime/build.py
    """
    if not has_package("triton"):
        return None
    chosen = os.environ.get("CC")
    compilers = [chosen] if chosen else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"no C compiler ({' or '.join(compilers)}), which Triton needs for the kernels of the loss"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "no Python.h, which Triton needs for the kernels of the loss"
    return None


def has_package(name: str) -> bool:
    """Whether a package can be imported, as far as can be seen without."""
    return name in sys.modules or importlib.util.find_spec(name) is not None
