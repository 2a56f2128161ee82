"""Attention over packed rows document by document: no dense mask, and no document sees another.

transformers' sdpa path pays for a mask over the whole flattened row, T x T for T tokens of many short documents. Here
`torch.nn.attention.varlen.varlen_attn` takes the documents' bounds, which TRL's collator passes as `cu_seq_lens_q`, on
CUDA; on a CPU each document goes through sdpa by itself. Whatever is not packed goes transformers' own way.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lorafit.speed.lever import BY_POSITION, Lever
from lorafit.speed.trial import trial, why_differs

NAME = "lorafit_varlen"

_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""Dropout of attention by the names of transformers' configs."""

SHORT = 256
"""Tokens of a document on a CPU, on average, below which torch's kernel is slower in bfloat16 than in float32."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, d], key and value [1, kv heads, T, d] -> [1, T, heads, d]; transformers' attention call."""
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **named)
    if query.is_cuda:
        return _flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    return _document_by_document(query, key, value, cu_seq_lens_q.tolist(), scaling, sliding_window), None


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    # The operator has no rule for autocast: after rotary positions queries and keys of a float32 base are float32.
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    by_token = [states[0].transpose(0, 1) for states in (query, key, value)]  # [T, heads, d]
    out = varlen_attn(
        by_token[0],
        by_token[1],
        by_token[2],
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **_GROUPED,
    )
    assert isinstance(out, torch.Tensor)  # a tuple only where auxiliary results are asked for
    return out[None]


_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch 2.11 takes grouped queries without being told, and knows no such argument:
https://github.com/pytorch/pytorch/pull/179468."""


def _document_by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[int],
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    is_short = query.shape[2] < SHORT * (len(bounds) - 1)
    if is_short:
        query, key, value = query.float(), key.float(), value.float()
    lengths, documents = [end - start for start, end in pairwise(bounds)], []
    # The gradient of a split is one tensor; that of a slice is one as long as the row for each document.
    of_each = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    with torch.autocast("cpu", enabled=False) if is_short else nullcontext():
        for length, (own_query, own_key, own_value) in zip(lengths, of_each, strict=True):
            mask = _window(length, sliding_window)
            states = scaled_dot_product_attention(
                own_query,
                own_key,
                own_value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            documents.append(states.transpose(1, 2))
    return torch.cat(documents, dim=1).to(dtype)


def _window(length: int, sliding_window: int | None) -> torch.Tensor | None:
    """[length, length], true where a token of a document longer than the window sees another; None if it sees all."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < sliding_window)


def packed_mask(*, allow_is_causal_skip: bool = True, use_vmap: bool = False, **named: Any) -> torch.Tensor | None:
    """No mask for a packed row, which transformers tells by position ids that begin anew; else sdpa's."""
    is_packed = not allow_is_causal_skip and not use_vmap and named.get("attention_mask") is None
    if is_packed and named["batch_size"] == 1:
        return None
    return sdpa_mask(allow_is_causal_skip=allow_is_causal_skip, use_vmap=use_vmap, **named)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)


def why_not(model: PreTrainedModel, *, dtype: torch.dtype) -> str | None:
    """The reason where the model keeps transformers' own attention.

    `dtype` is what attention computes in. The decision is a trial: states and gradients of three short documents in one
    row, by both ways.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"attention is {config._attn_implementation}"
    dropout = next((name for name in _DROPOUTS if getattr(config, name, 0)), None)
    if dropout is not None:
        return f"the model drops attention out ({dropout})"
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - BY_POSITION)
    if strange:
        return f"the model has layers of {strange[0]}"
    if model.device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention has no {str(dtype).removeprefix('torch.')}"
    usual = trial(model, dtype)
    model.set_attn_implementation(NAME)
    reason = why_differs(model, usual, dtype=dtype)
    model.set_attn_implementation("sdpa")
    return reason


def use_varlen_attention(model: PreTrainedModel) -> str:
    """Switch packed rows to it."""
    model.set_attn_implementation(NAME)
    return ""


def is_planned(model: PreTrainedModel, on_cuda: bool, in_16_bits: bool) -> bool:
    """As `why_not` would find without its trial."""
    config = model.config.get_text_config()
    is_usual = set(getattr(config, "layer_types", None) or ()) <= BY_POSITION
    return on_cuda and in_16_bits and is_usual and config._attn_implementation == "sdpa"


LEVER = Lever(
    key="varlen_attention",
    name="packed attention by document",
    why_not=lambda model, recipe, dtype: why_not(model, dtype=dtype),
    engage=use_varlen_attention,
    is_for_packed=True,
    attention=NAME,
    is_planned=is_planned,
)
