"""Loss of several adapters of one base on the held-out rows of the runs they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from lorafit.builders.base_model import load_base_model
from lorafit.builders.experts import used_patterns_are_known
from lorafit.builders.model_files import BaseModelFiles
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.data.prepare import prepare
from lorafit.merging.adapter_files import Adapter

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
    rows = {}
    for name, adapter in inputs.items():
        if found := _eval_rows(adapter, base_files, cache_dir=cache_dir):
            rows[name] = found
    if not rows:
        return ()
    first = next(iter(inputs.values()))
    quantization = None if first.recipe is None else first.recipe.recipe.quantization
    base = load_base_model(
        first.base, quantization, dtype="auto", device_map="cuda" if torch.cuda.is_available() else None
    )
    directories = {name: str(adapter.directory) for name, adapter in inputs.items()} | {"combined": str(combined)}
    losses: dict[str, dict[str, float]] = {name: {} for name in rows}
    for adapter_name, directory in directories.items():
        with used_patterns_are_known():
            model = PeftModel.from_pretrained(base, directory).eval()
        for name, sequences in rows.items():
            losses[name][adapter_name] = _loss(model, sequences)
        base = model.unload()
    return tuple(HeldOutLoss(name, len(rows[name]), losses[name]) for name in rows)


def _eval_rows(
    adapter: Adapter, base_files: BaseModelFiles, *, cache_dir: Path | None
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Tokens and labels."""
    if adapter.recipe is None:
        return []
    recipe = adapter.recipe.recipe
    if not recipe.data.eval and recipe.data.eval_fraction is None:
        return []
    data = prepare(
        recipe.data,
        task=recipe.task,
        tokenizer=load_tokenizer(adapter.base, stop_token=recipe.data.stop_token),
        max_length=recipe.training.max_length,
        seed=recipe.training.seed,
        stop_token_ids=base_files.stop_token_ids,
        vocab_size=base_files.vocab_size,
        cache_dir=cache_dir,
    )
    if data.eval is None:
        return []
    count = min(MOST_ROWS, len(data.eval))
    spread = data.eval.select([index * len(data.eval) // count for index in range(count)])
    return list(zip(spread["input_ids"], spread["labels"], strict=True))


@torch.no_grad()
def _loss(model: nn.Module, sequences: list[tuple[Sequence[int], Sequence[int]]]) -> float:
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for ids, labels in sequences:
        logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, :-1].float()
        targets = torch.tensor(labels[1:], device=device)
        total += float(nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        count += int((targets != -100).sum())
    return total / max(1, count)
