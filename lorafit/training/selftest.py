"""Does this set-up compute what is meant? The run's own model, collator and trainer on a few of its rows.

Packed documents see only themselves, padding changes nothing, the gradient does not depend on how a batch is divided,
and with the adapter switched off the model is its base. Each of these has been broken by a release of a library or by
an attention that ignores its mask, and none of them shows in the loss curve.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, PeftType
from transformers import PreTrainedTokenizerBase

from lorafit import __version__
from lorafit.builders.adapter import base_of
from lorafit.errors import VerificationError
from lorafit.recipe import LoadedRecipe, Recipe
from lorafit.speed.levers import Engaged
from lorafit.storage.files import write_file
from lorafit.storage.stage import scratch
from lorafit.training.out_of_memory import out_of_memory_is_said
from lorafit.training.restore_model import unchanged
from lorafit.training.selftest_bench import Bench, Check, switch_off_noise, wake_adapter
from lorafit.training.trainer.run_trainer import RunTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelfTest:
    """What was tried and what came of it; the JSON of `lorafit train --selftest`."""

    combination: dict[str, Any]
    """What it holds for: it is not tried again before one of these changes."""
    checks: tuple[Check, ...]
    seconds: float

    def line(self) -> str:
        """For people."""
        names = ", ".join(f"{check.name} {check.difference:.2g} of {check.tolerance:.2g}" for check in self.checks)
        return f"self-test passed in {self.seconds:.1f} s, differences: {names}"

    def result(self) -> dict[str, Any]:
        """For machines."""
        checks = [{key: value for key, value in asdict(check).items() if key != "failure"} for check in self.checks]
        return {"combination": self.combination, "checks": checks, "seconds": self.seconds}

    def figures(self) -> dict[str, float]:
        """For the event of a run."""
        return {check.name: check.difference for check in self.checks} | {"seconds": self.seconds}


def mark(cache: Path, combination: dict[str, Any]) -> Path:
    """The file that says of a combination that it has passed."""
    text = json.dumps(combination, sort_keys=True)
    return cache / "selftest" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def is_remembered(cache: Path | None, combination: dict[str, Any]) -> bool:
    """Whether it has passed before."""
    return cache is not None and mark(cache, combination).is_file()


def remember_passed(cache: Path | None, tested: SelfTest) -> None:
    """So that the next run of this combination need not try it; it does where the cache cannot be written."""
    if cache is not None:
        file = mark(cache, tested.combination)
        with suppress(OSError):  # costs only the next run, and preparing the rows says what is wrong with the cache
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(tested.result(), indent=1) + "\n")


def combination_of(model: PeftModel, recipe: Recipe, *, bf16: bool) -> dict[str, Any]:
    """All that decides which code computes a step."""
    base, config = base_of(model), model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    quantization = recipe.quantization
    packages = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
    return {
        "model": type(base).__name__,
        "attention": base.config._attn_implementation,
        "packing": recipe.training.is_packed,
        "loss": recipe.training.loss,
        "speed": recipe.speed.model_dump(),
        "adapter": [PeftType(config.peft_type).value, config.use_dora, sorted(config.modules_to_save or ())],
        "quantization": None if quantization is None else quantization.model_dump(mode="json"),
        "dtype": str(base.dtype),
        "autocast": "bf16" if bf16 else "fp16" if recipe.training.fp16 else "no",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"lorafit": __version__} | {package: version(package) for package in packages},
    }


def self_test(
    model: PeftModel,
    loaded: LoadedRecipe,
    *,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    bf16: bool,
    checkpointing: bool,
    engaged: Engaged,
) -> SelfTest:
    """Try everything on some of `rows`. Raises VerificationError with what failed; the model stays what it was."""
    started = time.monotonic()
    recipe = loaded.recipe
    combination = combination_of(model, recipe, bf16=bf16)
    with scratch() as directory, unchanged(model), _quick_collections():
        switch_off_noise(model)
        wake_adapter(model)
        bench = Bench(
            model,
            loaded,
            rows=rows,
            tokenizer=tokenizer,
            scratch=directory,
            bf16=bf16,
            checkpointing=checkpointing,
            engaged=engaged,
        )
        checks = tuple(bench.checks())
    failed = [check for check in checks if not check.has_passed]
    if any(check.name in ("packing", "padding") for check in failed):  # then rows together differ from rows alone, too
        failed = [check for check in failed if check.name != "accumulation"]
    if failed:
        raise VerificationError(loaded.problem(check.setting, check.failure) for check in failed)
    return SelfTest(combination, checks, round(time.monotonic() - started, 2))


class SelfTested(Exception):
    """Raised instead of the first step, with the result, where no more than the self-test was asked for."""

    def __init__(self, tested: SelfTest) -> None:
        super().__init__(tested)
        self.tested = tested


def self_test_once(
    trainer: RunTrainer,
    loaded: LoadedRecipe,
    *,
    rows: Dataset,
    cache_dir: Path | None,
    only: bool,
) -> SelfTest | None:
    """`self_test` of what `trainer` will do, unless this combination has passed it before.

    Raises VerificationError; SelfTested with `only`.

    With several processes it is left out: their trainers gather figures from one another in every step, and not all
    would come to the same end.
    """
    bf16, checkpointing = trainer.args.bf16, bool(trainer.args.gradient_checkpointing)
    if not only and is_remembered(cache_dir, combination_of(trainer.model, loaded.recipe, bf16=bf16)):
        return None
    if PartialState().num_processes > 1:
        logger.info("self-test left out with several processes: `lorafit train RECIPE --selftest` does it in one")
        return None
    with out_of_memory_is_said(loaded, doing=lambda: "training", checkpointing=checkpointing):
        tested = self_test(
            trainer.model,
            loaded,
            rows=rows,
            tokenizer=trainer.processing_class,
            bf16=bf16,
            checkpointing=checkpointing,
            engaged=trainer.engaged,
        )
    remember_passed(cache_dir, tested)
    if only:
        raise SelfTested(tested)
    logger.info(tested.line())
    return tested


@contextmanager
def _quick_collections() -> Iterator[None]:
    """A trainer begins with a garbage collection; over all that the libraries hold each takes longer than a check."""
    if gc.get_freeze_count():  # what was frozen as it was imported stays so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
