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
    documents = []
    with torch.autocast("cpu", enabled=False) if is_short else nullcontext():
        for start, end in pairwise(bounds):
            own, mask = slice(start, end), _window(end - start, sliding_window)
            documents.append(
                scaled_dot_product_attention(
                    query[:, :, own],
                    key[:, :, own],
                    value[:, :, own],
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
    return torch.cat(documents, dim=2).transpose(1, 2).to(dtype)


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
    usual = _trial(model, dtype)
    model.set_attn_implementation(NAME)
    try:
        ours = _trial(model, dtype)
        reason = _difference(usual, ours, dtype=dtype)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = f"the trial ended with {type(error).__name__}: {str(error).splitlines()[0]}"
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


def _trial(model: PreTrainedModel, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Last states [1, 24, hidden] and the gradient of the inputs [1, 24, hidden], in float32."""
    lengths = torch.tensor([5, 11, 8])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int().to(model.device)
    table = model.get_input_embeddings().weight
    chance = torch.Generator().manual_seed(0)
    shape = (1, int(lengths.sum()), model.config.get_text_config().hidden_size)
    inputs = (torch.randn(shape, generator=chance) * table.detach().float().std().cpu()).to(model.device, table.dtype)
    direction = torch.randn(shape, generator=chance).to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            inputs.requires_grad_()
            states = model.base_model(
                inputs_embeds=inputs,
                position_ids=torch.cat([torch.arange(length) for length in lengths.tolist()])[None].to(model.device),
                cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds,
                max_length_q=int(lengths.max()),
                max_length_k=int(lengths.max()),
                use_cache=False,
            ).last_hidden_state.float()
        (gradient,) = torch.autograd.grad((states * direction).sum(), inputs)
    finally:
        model.train(was_training)
    return states.detach(), gradient.float()


def _difference(
    usual: tuple[torch.Tensor, torch.Tensor], ours: tuple[torch.Tensor, torch.Tensor], *, dtype: torch.dtype
) -> str | None:
    """What differs by more than rounding through all layers gives: documents that see each other differ by about 1."""
    allowed = 1e-3 if dtype == torch.float32 else 0.05
    for what, expected, got in zip(("states", "gradients"), usual, ours, strict=True):
        apart = ((got - expected).norm() / expected.norm()).item()
        if not apart <= allowed:
            return f"its {what} differ by {apart:.2g}"
    return None


LEVER = Lever(
    key="varlen_attention",
    name="packed attention by document",
    why_not=lambda model, recipe, dtype: why_not(model, dtype=dtype),
    engage=use_varlen_attention,
    is_for_packed=True,
    attention=NAME,
    is_planned=is_planned,
)
