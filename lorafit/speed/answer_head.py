"""The loss of the trained positions alone, without TRL's tiles: what makes a step on a CPU about twice as fast.

TRL's fused head leaves out positions without a label on CUDA only, and elsewhere scores every one of them in tiles that
do not fit a CPU's cache, projecting once more in the backward pass. Here the gradient is taken while the logits of a
tile are still in the cache: two products with the head instead of three.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer
from trl.trainer.utils import FusedCausalLMOutput

from lorafit.builders.adapter import HeadWithTrainedRows, base_of
from lorafit.speed.lever import Lever

TILE_ELEMENTS = 2**24
"""Logits at a time: 64 MB of float32. Of 128 to 2,048 rows at vocabularies of 4,096 and 32,000, more than `MOST_ROWS`
gain 2 % at most, and fewer lose up to 14 %."""

MOST_ROWS = 512


class AnswerLoss(torch.autograd.Function):
    """Negative log-likelihood [N], entropy [N] and whether the target is the likeliest token [N], in nats."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        ids: torch.Tensor,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hidden` [N, H], `weight` [V, H], `targets` [N], `ids` [n] and the `rows` [n, H] that are trained in place of
        the head's own; products in `dtype`, everything else in float32."""
        weight, trained = weight.to(dtype), rows.to(dtype)
        count = hidden.shape[0]
        nll = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy, is_top1 = torch.empty_like(nll), torch.zeros_like(nll, dtype=torch.bool)
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden, dtype=dtype) if wants_gradient else None
        of_ids = torch.empty(count, len(ids), dtype=dtype, device=hidden.device)
        step = max(1, min(MOST_ROWS, TILE_ELEMENTS // weight.shape[0]))
        for start in range(0, count, step):
            tile = slice(start, start + step)
            target = targets[tile, None]
            states = hidden[tile].to(dtype)
            logits = (states @ weight.T).float()
            logits[:, ids] = (states @ trained.T).float()
            highest, of_target = logits.amax(dim=1, keepdim=True), logits.gather(1, target)
            # The likeliest token is the first of those that are level; to find it takes as long as all probabilities.
            level = (of_target == highest)[:, 0].nonzero()[:, 0]
            is_top1[start + level] = logits[level].argmax(dim=1) == target[level, 0]
            probabilities = logits.softmax(dim=1)
            log_total = -probabilities.amax(dim=1).log()  # beside the highest
            nll[tile] = (highest - of_target)[:, 0] + log_total
            entropy[tile] = highest[:, 0] + log_total - torch.linalg.vecdot(probabilities, logits)
            if gradient is not None:
                probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
                of_ids[tile] = probabilities[:, ids]
                probabilities[:, ids] = 0
                torch.addmm(of_ids[tile] @ trained, probabilities.to(dtype), weight, out=gradient[tile])
        # Without trained rows the states need not be kept.
        ctx.save_for_backward(gradient, of_ids, hidden if len(ids) else hidden[:0])
        ctx.hidden_dtype, ctx.rows_dtype = hidden.dtype, rows.dtype
        ctx.mark_non_differentiable(entropy, is_top1)
        return nll, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, nll_gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """Of `hidden` and of the trained rows: the rest of the head is frozen."""
        gradient, of_ids, hidden = ctx.saved_tensors
        of_hidden = (gradient * nll_gradient[:, None]).to(ctx.hidden_dtype)
        of_rows = (of_ids * nll_gradient[:, None]).to(of_ids.dtype)[: len(hidden)].T @ hidden.to(of_ids.dtype)
        return of_hidden, None, None, None, None, of_rows.to(ctx.rows_dtype)


def why_not(model: PreTrainedModel) -> str | None:
    """Why this model keeps TRL's head; None where the answer head gives the same."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if model.device.type == "cuda":
        return "TRL's own leaves out untrained positions on CUDA"
    if type(head) is HeadWithTrainedRows:
        head = head.original_module
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad:
        return "the head is not a plain frozen linear layer"
    scaled = [name for name in _SCALES if getattr(config, name, None) not in (None, 1.0)]
    if scaled:
        return f"the model scales its logits ({scaled[0]})"
    return None


_SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""What TRL's head applies to logits, by the names of transformers' configs."""


def _head(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its weight [V, H], the ids [n] and the rows [n, H] of tokens that are trained; n is 0 where there are none."""
    head = model.get_output_embeddings()
    if not isinstance(head, HeadWithTrainedRows):
        return head.weight, torch.empty(0, dtype=torch.long, device=head.weight.device), head.weight[:0]
    tokens, weight = head.token_adapter, head.original_module.weight
    ids = [] if tokens.disable_adapters else tokens.token_indices["default"]
    rows = tokens.trainable_tokens_delta["default"][: len(ids)]
    return weight, torch.tensor(ids, dtype=torch.long, device=weight.device), rows


def use_answer_head(model: PreTrainedModel) -> None:
    """Answer `model(..., labels=, fused_lm_head=True)`, TRL's own call, by `AnswerLoss`; any other as before."""
    by_trl: Callable[..., Any] = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(*inputs: Any, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **named: Any) -> Any:
        is_other = named.get("shift_labels") is not None or named.get("output_router_logits")
        if not fused_lm_head or labels is None or is_other:
            return by_trl(*inputs, fused_lm_head=fused_lm_head, labels=labels, **named)
        named = {key: value for key, value in named.items() if key not in ("shift_labels", "num_items_in_batch")}
        states = model.base_model(*inputs, **named | {"use_cache": False}).last_hidden_state[:, :-1]
        (weight, ids, rows), labels = _head(model), labels[:, 1:]
        mask = labels != -100
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        scored = AnswerLoss.apply(states[mask], weight, labels[mask], dtype, ids, rows)
        # Scattering keeps a batch without a trained position connected to the model: a zero that can go backward.
        nll, entropy, is_top1 = (values.new_zeros(mask.shape).masked_scatter(mask, values) for values in scored)
        return FusedCausalLMOutput(
            loss=nll.sum() / mask.sum().clamp(min=1),
            log_probs=-nll,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=mask,
        )

    model.forward = forward


def _engage(trainer: Trainer) -> str:
    """After TRL's head is on."""
    assert isinstance(trainer.model, PeftModel)
    use_answer_head(base_of(trainer.model))
    return ""


LEVER = Lever(
    key="answer_head",
    name="answer head",
    why_not=lambda model, recipe, dtype: why_not(model),
    engage=_engage,
    goes_on="trainer",
    keeps_router_loss=False,
)
