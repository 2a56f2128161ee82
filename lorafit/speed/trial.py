"""A lever, tried on the model of the run: states and gradients of three short documents in one row, by both ways."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from lorafit.builders.model_modules import weight_of

LENGTHS = (5, 11, 8)
"""Tokens of each document."""


class Tried(NamedTuple):
    """What came of it, in float32."""

    states: torch.Tensor
    """The last ones [1, 24, hidden]."""
    gradients: torch.Tensor
    """Of the inputs [1, 24, hidden]."""


def trial(model: PreTrainedModel, dtype: torch.dtype, *, counts: torch.Tensor | None = None) -> Tried:
    """By the way the model goes now. `dtype` is what products are computed in; states where `counts` [1, 24] is false
    lead to no loss, and come out as zero."""
    lengths = torch.tensor(LENGTHS)
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int().to(model.device)
    table = weight_of(model.get_input_embeddings())
    chance = torch.Generator().manual_seed(0)
    shape = (1, sum(LENGTHS), model.config.get_text_config().hidden_size)
    inputs = (torch.randn(shape, generator=chance) * table.detach().float().std().cpu()).to(model.device, table.dtype)
    direction = torch.randn(shape, generator=chance).to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            inputs.requires_grad_()
            states = model.base_model(
                inputs_embeds=inputs,
                position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None].to(model.device),
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                max_length_q=max(LENGTHS),
                max_length_k=max(LENGTHS),
                use_cache=False,
            ).last_hidden_state.float()
        if counts is not None:
            states = states * counts[..., None]
        (gradient,) = torch.autograd.grad((states * direction).sum(), inputs)
    finally:
        model.train(was_training)
    return Tried(states.detach(), gradient.float())


def why_differs(
    model: PreTrainedModel, usual: Tried, *, dtype: torch.dtype, counts: torch.Tensor | None = None
) -> str | None:
    """What a trial gives now that it did not give as usual, by more than rounding through all layers makes of it:
    documents that see each other differ by about 1. None where there is nothing."""
    try:
        ours = trial(model, dtype, counts=counts)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"the trial ended with {type(error).__name__}: {str(error).splitlines()[0]}"
    allowed = 1e-3 if dtype == torch.float32 else 0.05
    for what, expected, got in zip(Tried._fields, usual, ours, strict=True):
        apart = ((got - expected).norm() / expected.norm()).item()
        if not apart <= allowed:
            return f"its {what} differ by {apart:.2g}"
    return None
