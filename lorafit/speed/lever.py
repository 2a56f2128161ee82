"""A lever: another way to the same figures, faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lorafit.recipe import Recipe

ROUTED = "the loss of the model's router counts every position"

BY_POSITION = {"full_attention", "sliding_attention"}
"""Layers, by transformers' names, in which packed documents see each other or not by positions and bounds alone."""


@dataclass(frozen=True)
class Lever:
    """The whole of a lever. It lives in the file of its key's name, and its key is a field of the recipe's `speed`."""

    key: str
    name: str
    """For people."""

    why_not: Callable[[PreTrainedModel, Recipe, torch.dtype], str | None]
    """Why this model, adapter and all, keeps the libraries' way; None where both give the same. The type is that which
    products are computed in."""

    engage: Callable[[Any], str]
    """Put it on the model, or on the trainer; what its line goes on with after `on`."""

    goes_on: Literal["model", "trainer"] = "model"

    keeps_router_loss: bool = True
    """Whether the loss of a router, a mean over all positions, comes out the same."""

    is_for_packed: bool = False
    """For packed rows alone."""

    is_for_compiled: bool = False
    """For models under `training.torch_compile` alone, which all others leave alone."""

    attention: str | None = None
    """The name by which transformers knows its attention, where it brings one."""

    is_planned: Callable[[PreTrainedModel, bool, bool], bool] | None = None
    """Whether a planned step has it, told without a trial from: the empty model, is it on CUDA, is it in 16 bits. None
    where it changes nothing that is planned."""


def has_router_loss(model: PreTrainedModel, recipe: Recipe) -> bool:
    """Whether the balance of a router goes into the loss.

    TRL decides it by these, and writes it into the model's config, when its trainer is made: after the levers are
    pulled (trl 1.16, `SFTTrainer.__init__`).
    """
    config = model.config.get_text_config()
    weight = recipe.training.extra.get("router_aux_loss_coef")
    if weight is None:
        weight = getattr(config, "router_aux_loss_coef", 0.0)
    return hasattr(config, "output_router_logits") and weight != 0.0
