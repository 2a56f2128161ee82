"""The last layer for the trained positions alone, as far as positions do not see each other there.

Only trained positions reach the loss. Of all others the last layer need not give more than keys and values: its
queries, what follows its attention, and their gradients are computed for trained positions, and are zero elsewhere.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafit.builders.adapter import base_of
from lorafit.speed.lever import Lever
from lorafit.speed.trial import LENGTHS, trial, why_differs

PARTS = ("q_proj", "o_proj", "mlp")
"""What takes each position by itself, by the names of transformers' decoder layers."""


class TrainedRows:
    """Picks the positions that count out of what goes into a module, and puts what comes out in their places."""

    def __init__(self) -> None:
        self._shape = torch.Size()
        self._index = torch.empty(0, dtype=torch.long)

    def choose(self, counts: torch.Tensor | None) -> None:
        """Those where `counts` [B, T] is true, until the next call: what the backward pass recomputes sees them, too.
        None leaves modules as they are."""
        self._shape = torch.Size() if counts is None else counts.shape
        if counts is not None:
            self._index = counts.flatten().nonzero()[:, 0]

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """From now on `module` sees those alone."""
        return [module.register_forward_pre_hook(self._take), module.register_forward_hook(self._put_back)]

    def _take(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """States [B, T, in] -> [1, n, in]."""
        if inputs[0].shape[:2] != self._shape:
            return None
        return (inputs[0].flatten(0, 1).index_select(0, self._index)[None], *inputs[1:])

    def _put_back(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor | None:
        """States [1, n, out] -> [B, T, out]. No last position is trained: fewer than T say that `_take` took them."""
        if not self._shape or out.shape[:2] != (1, len(self._index)):
            return None
        everywhere = out.new_zeros(self._shape.numel(), out.shape[-1])
        return everywhere.index_copy_(0, self._index, out[0]).view(*self._shape, -1)


def parts_of_last_layer(model: PreTrainedModel) -> list[nn.Module]:
    """Those of `PARTS` that the last decoder layer has."""
    layers = [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [part for name, part in layers[-1].named_modules() if name.rpartition(".")[2] in PARTS] if layers else []


def why_not(model: PreTrainedModel, *, dtype: torch.dtype) -> str | None:
    """Why the last layer computes all positions; None where those that are trained come out the same without."""
    parts = parts_of_last_layer(model)
    if model.device.type == "cuda":
        return "to count the trained positions, a GPU would be waited for"
    if not parts:
        return f"the last layer has no {', '.join(PARTS[:-1])} or {PARTS[-1]}"
    if any(isinstance(module, nn.Dropout) and module.p for part in parts for module in part.modules()):
        return "dropout would draw other numbers"
    counts = torch.cat([torch.arange(length) >= length // 2 for length in LENGTHS])[None]
    counts[0, -1] = False
    usual = trial(model, dtype, counts=counts)
    rows = TrainedRows()
    rows.choose(counts)
    hooks = [hook for part in parts for hook in rows.hook(part)]
    reason = why_differs(model, usual, dtype=dtype, counts=counts)
    for hook in hooks:
        hook.remove()
    return reason


def use_last_layer(model: PreTrainedModel) -> None:
    """Let `model(..., labels=, fused_lm_head=True)`, TRL's own call, do so in training; any other is as before."""
    rows = TrainedRows()
    for part in parts_of_last_layer(model):
        rows.hook(part)
    whole = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(*inputs: Any, labels: torch.Tensor | None = None, **named: Any) -> Any:
        is_scored = named.get("fused_lm_head") and named.get("shift_labels") is None
        if labels is None or not is_scored or not model.training:
            rows.choose(None)
        else:
            rows.choose(nn.functional.pad(labels[:, 1:] != -100, (0, 1)))
        return whole(*inputs, labels=labels, **named)

    model.forward = forward


def _engage(trainer: Trainer) -> str:
    assert isinstance(trainer.model, PeftModel)
    use_last_layer(base_of(trainer.model))
    return ""


LEVER = Lever(
    key="last_layer",
    name="last layer for trained positions",
    why_not=lambda model, recipe, dtype: why_not(model, dtype=dtype),
    engage=_engage,
    goes_on="trainer",
    keeps_router_loss=False,
)
