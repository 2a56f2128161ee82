"""Packed rows of one length, so that what `torch.compile` made for the first of them serves all.

A packed row holds whole documents and is rarely full, so each micro-batch has a length of its own, and a compiled model
is compiled again for it. Here the flattened row goes on, up to the longest there can be, with documents of padding:
their positions begin anew, so no other sees them, and none of their tokens is trained.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import datasets
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from lorafit.recipe import Recipe
from lorafit.speed.lever import BY_POSITION, Lever


def why_not(model: PreTrainedModel, recipe: Recipe) -> str | None:
    """Why packed rows keep their lengths; None where filling them up changes no loss and no gradient."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention is {config._attn_implementation}, which is told the bounds of documents"
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - BY_POSITION)
    if strange:
        return f"the model has layers of {strange[0]}"
    if recipe.training.neftune_noise_alpha:
        return "training.neftune_noise_alpha depends on the length"
    if recipe.health.on_oom == "halve_batch":
        return "health.on_oom: halve_batch needs shorter rows"
    return None


def longest_held_out(rows: datasets.Dataset, *, batch: int) -> int:
    """Tokens of the `batch` longest rows: what one flattened batch of them can hold."""
    return sum(heapq.nlargest(batch, (len(tokens) for tokens in rows["input_ids"])))


def filled(batch: dict[str, Any], *, length: int, longest: int, pad_token_id: int) -> dict[str, Any]:
    """A flattened batch [1, T] as [1, length]; documents of padding hold at most `longest` tokens, as positions of the
    model may end there. The bounds of documents are left out: sdpa and eager attention take them from the positions."""
    device, missing = batch["input_ids"].device, length - batch["input_ids"].shape[1]
    tails = {
        "input_ids": torch.full((1, missing), pad_token_id, device=device),
        "labels": torch.full((1, missing), -100, device=device),
        "position_ids": (torch.arange(missing, device=device) % longest)[None],
    }
    bounds = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
    others = {name: value for name, value in batch.items() if name not in bounds}
    return others | {name: torch.cat([batch[name], tail], dim=1) for name, tail in tails.items()}


def with_fixed_length(model: Callable[..., Any], *, length: int, longest: int, pad_token_id: int) -> Callable[..., Any]:
    """`model`, called with each batch filled up; what it gives back has positions to spare, which count for nothing."""

    def forward(**batch: Any) -> Any:
        return model(**filled(batch, length=length, longest=longest, pad_token_id=pad_token_id))

    return forward


class CallsItsModel(Protocol):
    """A trainer that calls its model through what `called` makes of it."""

    called: Callable[[Any], Any]
    model: nn.Module
    args: SFTConfig
    eval_dataset: datasets.Dataset
    processing_class: PreTrainedTokenizerBase


def use_fixed_length(trainer: CallsItsModel) -> str:
    """Let it fill up each batch: in training to the rows that there is room for, else to the longest held-out ones."""

    @cache
    def held_out() -> int:
        return longest_held_out(trainer.eval_dataset, batch=trainer.args.per_device_eval_batch_size)

    def called(model: Callable[..., Any]) -> Callable[..., Any]:
        args, longest = trainer.args, trainer.args.max_length
        assert longest is not None  # of packed rows
        length = args.per_device_train_batch_size * longest if trainer.model.training else held_out()
        pad_token_id = trainer.processing_class.pad_token_id
        return with_fixed_length(model, length=length, longest=longest, pad_token_id=pad_token_id)

    trainer.called = called
    return ""


LEVER = Lever(
    key="fixed_length",
    name="packed rows of one length",
    why_not=lambda model, recipe, dtype: why_not(model, recipe),
    engage=use_fixed_length,
    goes_on="trainer",
    keeps_router_loss=False,
    is_for_packed=True,
    is_for_compiled=True,
)
