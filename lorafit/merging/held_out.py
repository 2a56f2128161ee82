"""Loss of several adapters of one base on the held-out rows of the runs they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from peft import PeftModel

from lorafit.builders.base_model import load_base_model
from lorafit.builders.experts import used_patterns_are_known
from lorafit.builders.model_files import BaseModelFiles
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.data.prepare import prepare
from lorafit.merging.adapter_files import Adapter
from lorafit.tasks import TaskName
from lorafit.tasks.pages import page

MOST_ROWS = 200
"""Of each run: a mean over them is good to a few hundredths of a nat."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss of each adapter on the held-out rows of one run."""

    rows_of: str
    """The run."""
    rows: int
    losses: Mapping[str, float]
    """Adapter to loss in nats per trained token."""


def held_out_losses(
    inputs: Mapping[str, Adapter], base_files: BaseModelFiles, *, combined: Path, cache_dir: Path | None
) -> tuple[HeldOutLoss, ...]:
    """For every input that is a run with held-out rows; the base is loaded only when there is one."""
    held_out = {name: _held_out(adapter, base_files, cache_dir=cache_dir) for name, adapter in inputs.items()}
    found = {name: rows for name, rows in held_out.items() if rows is not None}
    if not found:
        return ()
    first = next(iter(inputs.values()))
    quantization = None if first.recipe is None else first.recipe.recipe.quantization
    base = load_base_model(
        first.base, quantization, dtype="auto", device_map="cuda" if torch.cuda.is_available() else None
    )
    directories = {name: str(adapter.directory) for name, adapter in inputs.items()} | {"combined": str(combined)}
    losses: dict[str, dict[str, float]] = {name: {} for name in found}
    for adapter_name, directory in directories.items():
        with used_patterns_are_known():
            model = PeftModel.from_pretrained(base, directory).eval()
        for name, rows in found.items():
            measured = page(rows.task).held_out(model, rows.table, pad_token_id=rows.pad_token_id)
            losses[name][adapter_name] = measured.loss
        base = model.unload()
    return tuple(HeldOutLoss(name, len(rows.table), losses[name]) for name, rows in found.items())


class _HeldOut(NamedTuple):
    """Some held-out rows of a run."""

    task: TaskName
    table: datasets.Dataset
    pad_token_id: int


def _held_out(adapter: Adapter, base_files: BaseModelFiles, *, cache_dir: Path | None) -> _HeldOut | None:
    if adapter.recipe is None:
        return None
    recipe = adapter.recipe.recipe
    if not recipe.data.eval and recipe.data.eval_fraction is None:
        return None
    tokenizer = load_tokenizer(adapter.base, stop_token=recipe.data.stop_token)
    data = prepare(
        recipe.data,
        task=recipe.task,
        tokenizer=tokenizer,
        max_length=recipe.training.max_length,
        seed=recipe.training.seed,
        stop_token_ids=base_files.stop_token_ids,
        vocab_size=base_files.vocab_size,
        cache_dir=cache_dir,
    )
    if data.eval is None:
        return None
    count = min(MOST_ROWS, len(data.eval))
    spread = data.eval.select([index * len(data.eval) // count for index in range(count)])
    return _HeldOut(recipe.task, spread, int(tokenizer.pad_token_id))
