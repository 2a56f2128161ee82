"""Answers of planning as JSON, for the tests: `python tests/support/plan_probe.py [slow]`.

Planning replaces functions of the libraries, so it never runs in the process of the tests; each answer here is made by
a fork of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plan_vs_cpu
import plan_vs_published
import torch
from transformers import Gemma2Config, PreTrainedConfig

from lorafit.planning.estimate import Estimator
from lorafit.planning.extrapolate_layers import WholeStep, begin_replay, whole_step
from lorafit.planning.fake_step import Batch, FakeRun, Measured
from lorafit.planning.gpus import Gpu
from lorafit.planning.known_shapes import architecture
from lorafit.planning.largest_that_fit import largest_that_fit
from lorafit.planning.plan_result import Largest
from lorafit.recipe import LoadedRecipe, load
from lorafit.recipe.sections import ModelSection

TWO_KINDS = Gemma2Config(
    vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=7, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, sliding_window=64, max_position_embeddings=512, dtype="bfloat16",
)  # fmt: skip
CPU_CASES = ["lora packed", "adalora", "qlora checkpointing", "fsdp2 qlora checkpointing"]
SLOW_CPU_CASES = ["lora", "lora padded", "dora", "fsdp2 lora"]
FOUR_BITS = "quantization.load_in_4bit=true"
GIB = 2**30


def recipe(*keys: str) -> LoadedRecipe:
    """The smallest recipe with these keys."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "x.yaml")
        path.write_text("model: {model_name_or_path: x}\ndata: {train: [{path: rows.jsonl}]}\n", encoding="utf-8")
        return load(path, overrides=keys)


def step(config: PreTrainedConfig, batch: Batch, *keys: str, checkpointing: bool = True, **how: Any) -> WholeStep:
    """Of the whole depth, extrapolated."""
    run = FakeRun(recipe(*keys), config=copy.deepcopy(config), bf16=True, checkpointing=checkpointing)
    return whole_step(run, batch, **({"eval_batch": None, "passes": 1, "replay": False} | how))


def llama3_8b() -> PreTrainedConfig:
    return architecture(ModelSection(model_name_or_path="llama3-8b"))


def against_the_cpu(name: str) -> list[int]:
    """[predicted, measured]: short rows of the tiny model."""
    case = next(case for case in plan_vs_cpu.CASES if case.name == name)
    case = dataclasses.replace(case, size=2, length=96)
    return [apart(plan_vs_cpu.predicted, case), apart(plan_vs_cpu.measured, case)]


def known_llama(*keys: str, checkpointing: bool, size: int = 1) -> float:
    batch = Batch("full", size, 2048)
    whole = step(llama3_8b(), batch, "speed.fused_lora=false", *keys, checkpointing=checkpointing)
    return whole.peak.total / GIB


def adapter_bytes() -> list[int]:
    """On a 16-bit base, on one of 4 bits, and on that one with fp16, whose loss scale takes no bfloat16."""
    keys: tuple[tuple[str, ...], ...] = ((), (FOUR_BITS,), (FOUR_BITS, "training.fp16=true"))
    runs = (
        FakeRun(recipe(*some), config=copy.deepcopy(plan_vs_cpu.TINY), bf16=True, checkpointing=False) for some in keys
    )
    return [run.trained_bytes for run in runs]


def affine(checkpointing: bool) -> list[int]:
    """[extrapolated, run in its whole depth] of a model with two kinds of layers."""
    batch = Batch("padded", 2, 128)
    run = FakeRun(recipe(), config=copy.deepcopy(TWO_KINDS), bf16=True, checkpointing=checkpointing)
    extrapolated = whole_step(run, batch, eval_batch=batch, passes=2, replay=False).peak.total
    run = FakeRun(recipe(), config=copy.deepcopy(TWO_KINDS), bf16=True, checkpointing=checkpointing)
    return [extrapolated, run.step(range(7), batch, eval_batch=batch, passes=2).most_allocated]


class Counted(FakeRun):
    """Knows how many layers each step had that ran here."""

    def __init__(self, *, fails_elsewhere: bool = False) -> None:
        self.depths: list[int] = []
        self._here = os.getpid() if fails_elsewhere else None
        super().__init__(recipe(), config=copy.deepcopy(plan_vs_cpu.TINY), bf16=True, checkpointing=True)

    def _run(self, indices: tuple[int, ...], *rest: Any, **named: Any) -> Measured:
        if self._here not in (None, os.getpid()):
            raise MemoryError
        self.depths.append(len(indices))
        return super()._run(indices, *rest, **named)


def steps_run() -> list[list[int]]:
    """Layers of each step that is run for an estimate, for it and its replay, for another batch, and for the first."""
    run, found = Counted(), []
    for length, replay in ((32, False), (32, True), (48, False), (32, False)):
        whole_step(run, Batch("full", 1, length), eval_batch=None, passes=1, replay=replay)
        found.append(run.depths[:])
        run.depths.clear()
    return found


def step_elsewhere() -> list[Any]:
    """Layers of each step that runs here where the replay runs in a copy, and where the copy fails; whether both come
    to the same as a process alone."""
    batch, how = Batch("full", 1, 32), {"eval_batch": Batch("full", 2, 32), "passes": 2}
    run, failing, alone = Counted(), Counted(fails_elsewhere=True), Counted()
    for one in (run, failing):
        begin_replay(one, batch, **how)  # type: ignore[arg-type]
    found = [whole_step(one, batch, replay=True, **how) for one in (run, failing, alone)]  # type: ignore[arg-type]
    return [run.depths, failing.depths, found[0] == found[2] and found[1] == found[2]]


def monotone() -> dict[str, list[int]]:
    """Peaks at growing values of each knob."""
    config = plan_vs_cpu.TINY

    def peak(size: int = 2, length: int = 64, r: int = 8, passes: int = 1) -> int:
        return step(config, Batch("padded", size, length), f"lora.r={r}", passes=passes).peak.total

    least = peak()
    return {
        "batch": [least, peak(size=3)],
        "length": [least, peak(length=65)],
        "rank": [least, peak(r=9)],
        "passes": [least, peak(passes=2)],
    }


def spread(gpus: int) -> int:
    """Weights on each of `gpus`, 8B."""
    loaded = recipe("launch.strategy=fsdp2")
    run = FakeRun(loaded, config=llama3_8b(), bf16=True, checkpointing=True, spread=gpus)
    return whole_step(run, Batch("full", 1, 512), eval_batch=None, passes=1, replay=False).peak.parts["weights"]


def loading_in_4_bits() -> tuple[str, int]:
    """Where the peak of an 8B base in 4 bits over 4 GPUs is, and the weights on each of them there."""
    keys = ("quantization.load_in_4bit=true", "quantization.bnb_4bit_quant_storage=bfloat16", "training.max_length=512")
    loaded = recipe("launch.strategy=fsdp2", "training.gradient_checkpointing=true", *keys)
    estimate = Estimator(loaded, config=llama3_8b(), gpu=Gpu("x", 24 * GIB), count=4).estimate(loaded.recipe)
    return estimate.peak_at, estimate.parts["weights"]


def checkpointing_by_plan() -> list[tuple[bool, str]]:
    """On a small GPU and on a large one."""
    loaded = recipe("training.per_device_train_batch_size=8", "training.max_length=1024")
    estimates = (
        Estimator(loaded, config=plan_vs_cpu.TINY, gpu=Gpu("x", memory), count=1).estimate(loaded.recipe)
        for memory in (GIB, 24 * GIB)
    )
    return [(one.checkpointing, one.checkpointing_reason) for one in estimates]


def largest() -> list[Any]:
    """Each largest value of the tiny model in 1.2 GiB, and whether the next one fits."""
    config, gpu = plan_vs_cpu.TINY, Gpu("small", int(0.75 * GIB))
    loaded = recipe("training.gradient_checkpointing=false", "training.max_length=256")
    estimator = Estimator(loaded, config=config, gpu=gpu, count=1)
    found: tuple[Largest, ...] = largest_that_fit(estimator, loaded.recipe, longest=4096)
    batch = found[0].value or 0
    verdicts = [
        estimator.estimate(recipe(*(
            "training.gradient_checkpointing=false", "training.max_length=256",
            f"training.per_device_train_batch_size={value}",
        )).recipe).verdict
        for value in (batch, batch + 1)
    ]  # fmt: skip
    return [[one.value for one in found], verdicts]


def apart(what: Callable[..., Any], *arguments: Any) -> Any:
    """In a process forked from this one: no GPU is touched here, and the imports are done."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        warnings.filterwarnings("ignore")
        torch.manual_seed(0)
        sender.send(what(*arguments))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the process ended without an answer") from None
    finally:
        process.join()


def quick() -> dict[str, Any]:
    """One case of each kind."""
    return {
        "cpu": {name: against_the_cpu(name) for name in CPU_CASES},
        "llama3-8b": {
            "checkpointing": apart(lambda: known_llama(checkpointing=True)),
            "4 bits, 4 rows, kept": apart(lambda: known_llama(FOUR_BITS, checkpointing=False, size=4)),
        },
        "published": [apart(plan_vs_published.predicted, row) for row in plan_vs_published.ROWS[2:3]],
        "affine": [apart(affine, True)],
        "steps": apart(steps_run),
        "elsewhere": apart(step_elsewhere),
        "monotone": apart(monotone),
        "spread": apart(spread, 4),
        "loading": apart(loading_in_4_bits),
        "adapter": apart(adapter_bytes),
        "checkpointing": apart(checkpointing_by_plan),
    }


def slow() -> dict[str, Any]:
    """The others."""
    return {
        "cpu": {name: against_the_cpu(name) for name in SLOW_CPU_CASES},
        "llama3-8b": {
            "kept": apart(lambda: known_llama(checkpointing=False)),
            "4 bits": apart(lambda: known_llama(FOUR_BITS, checkpointing=True)),
        },
        "affine": [apart(affine, False)],
        "largest": apart(largest),
    }


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()
    print(json.dumps(slow() if sys.argv[1:] == ["slow"] else quick()))


if __name__ == "__main__":
    main()
