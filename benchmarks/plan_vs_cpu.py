"""Predicted peak memory of a training step beside what torch's CPU allocator gives out for the same step.

    python benchmarks/plan_vs_cpu.py [--quick]

Both sides build the same model, adapter, trainer and optimizer through lorafit's builders; one runs them on fake
tensors under the tracker, the other on real ones under the profiler. Ends with exit code 1 when one is off by 0.5 %.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import LlamaConfig

from lorafit.planning.extrapolate_layers import whole_step
from lorafit.planning.fake_step import Batch, FakeRun, Rows
from lorafit.planning.real_step import RealRun
from lorafit.recipe import LoadedRecipe, load

ALLOWED = 0.005
MIB = 2**20
TINY = LlamaConfig(
    vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
SIXTY_MILLION = LlamaConfig(
    vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
MODELS = {"tiny": TINY, "60M": SIXTY_MILLION}


@dataclass(frozen=True)
class Case:
    """One step: a batch and what of the recipe is not the default."""

    name: str
    model: str = "tiny"
    rows: Rows = "full"
    size: int = 4
    length: int = 512
    passes: int = 1
    checkpointing: bool = False
    bf16: bool = True
    gpus: int = 1
    """That FSDP2 shares the weights out to. The others are not there: one process measures its own part."""
    keys: tuple[str, ...] = field(default=())


QLORA = ("quantization.load_in_4bit=true",)
ADALORA = ("adalora.target_r=8", "adalora.init_r=12", "adalora.tinit=1", "adalora.tfinal=1")
FSDP2 = ("launch.strategy=fsdp2", "training.optim=adamw_torch_fused")
FSDP2_QLORA = (*FSDP2, *QLORA, "quantization.bnb_4bit_quant_storage=bfloat16")
CASES = (
    Case("lora"),
    Case("lora float32", bf16=False),
    Case("lora checkpointing", checkpointing=True),
    Case("lora peft's path", keys=("speed.fused_lora=false",)),
    Case("lora padded", rows="padded"),
    Case("lora packed", rows="packed", keys=("training.packing=true",)),
    Case("lora accumulating", passes=2),
    Case("lora short", length=64),
    Case("lora long", size=1, length=2048),
    Case("lora r 1", keys=("lora.r=1",)),
    Case("lora r 64 attention", keys=("lora.r=64", 'lora.target_modules=["q_proj","v_proj"]')),
    Case("lora dropout", keys=("lora.lora_dropout=0.1",)),
    Case("lora adamw_torch", keys=("training.optim=adamw_torch",)),
    Case("lora sgd", keys=("training.optim=sgd",)),
    Case("lora adafactor", keys=("training.optim=adafactor",)),
    Case("lora adamw_8bit r 64", keys=("training.optim=adamw_8bit", "lora.r=64")),
    Case("lora+ ", keys=("optimizer.loraplus_lr_ratio=16",)),
    Case("dora", keys=("lora.use_dora=true",)),
    Case("dora checkpointing", checkpointing=True, keys=("lora.use_dora=true",)),
    Case("adalora", keys=ADALORA),
    Case("qlora", keys=QLORA),
    Case("qlora checkpointing", checkpointing=True, keys=QLORA),
    Case("fsdp2 lora", gpus=2, keys=FSDP2),
    Case("fsdp2 lora float32", gpus=2, bf16=False, keys=FSDP2),
    Case("fsdp2 lora checkpointing", gpus=4, checkpointing=True, keys=FSDP2),
    Case("fsdp2 lora accumulating", gpus=2, passes=2, keys=FSDP2),
    Case("fsdp2 qlora", gpus=2, keys=FSDP2_QLORA),
    Case("fsdp2 qlora checkpointing", gpus=4, checkpointing=True, keys=FSDP2_QLORA),
    Case("60M fsdp2 lora", model="60M", gpus=2, size=2, keys=FSDP2),
    Case("60M fsdp2 qlora checkpointing", model="60M", gpus=4, size=2, checkpointing=True, keys=FSDP2_QLORA),
    Case("60M lora", model="60M", size=2),
    Case("60M lora checkpointing", model="60M", size=2, checkpointing=True),
    Case("60M lora padded", model="60M", size=2, rows="padded"),
    Case("60M dora checkpointing", model="60M", size=2, checkpointing=True, keys=("lora.use_dora=true",)),
    Case("60M qlora checkpointing", model="60M", size=2, checkpointing=True, keys=QLORA),
    Case("60M lora long", model="60M", size=1, length=2048, checkpointing=True),
    Case("60M adalora", model="60M", size=2, keys=ADALORA),
)
QUICK = (
    "lora",
    "lora checkpointing",
    "lora padded",
    "lora packed",
    "dora",
    "adalora",
    "qlora checkpointing",
    "fsdp2 lora",
    "fsdp2 qlora checkpointing",
    "60M lora",
)


def recipe_of(case: Case, directory: Path) -> LoadedRecipe:
    """The recipe of a case; its model is given by the architecture, its rows by the batch."""
    path = directory / "case.yaml"
    path.write_text("model: {model_name_or_path: stand-in}\ndata: {train: [{path: rows.jsonl}]}\n", encoding="utf-8")
    return load(path, overrides=[f"training.gradient_accumulation_steps={case.passes}", *case.keys])


def predicted(case: Case) -> int:
    """Bytes at the peak, from fake tensors."""
    with _built(case, FakeRun) as run:
        batch = Batch(case.rows, case.size, case.length)
        return whole_step(run, batch, eval_batch=None, passes=case.passes, replay=False).peak.total


def measured(case: Case) -> int:
    """Bytes at the peak, from real ones."""
    with _built(case, RealRun) as run:
        return run.measure(Batch(case.rows, case.size, case.length), passes=case.passes).allocated


@contextlib.contextmanager
def _built(case: Case, kind: type[FakeRun]) -> Iterator[Any]:
    config = MODELS[case.model].__class__(**MODELS[case.model].to_dict())
    config.dtype = torch.bfloat16 if case.bf16 else torch.float32
    with tempfile.TemporaryDirectory() as directory:
        loaded = recipe_of(case, Path(directory))
        how: dict[str, Any] = {"bf16": case.bf16, "checkpointing": case.checkpointing, "spread": case.gpus}
        yield kind(loaded, config=config, on_cuda=False, **how)


def apart(what: Callable[[Case], int], case: Case) -> int:
    """In a process of its own, forked from this one: what planning replaces in the libraries ends with it."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def work() -> None:
        warnings.filterwarnings("ignore")
        torch.manual_seed(0)
        answers.put(what(case))

    process = context.Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{case.name}: {what.__name__} ended with {process.exitcode}")
    return answers.get()


def main() -> int:
    """The table; 1 when a case is off by more than ALLOWED."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases")
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    errors = []
    print(f"{'case':<30} {'predicted':>12} {'measured':>12}     off")
    for case in CASES:
        if chosen.quick and case.name not in QUICK:
            continue
        one, other = apart(predicted, case), apart(measured, case)
        errors.append(abs(one / other - 1))
        print(f"{case.name:<30} {one / MIB:>8.2f} MiB {other / MIB:>8.2f} MiB {one / other - 1:>+7.3%}", flush=True)
    print(f"{len(errors)} cases, the furthest off by {max(errors):.3%}; allowed {ALLOWED:.1%}")
    return int(max(errors) > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
