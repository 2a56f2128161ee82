"""Plain LoRA as one autograd function: `out = W·x + s·B·A·x` written into the base's output, its gradient likewise.

peft's own path casts the input to the adapter's type and makes the update, its scaled copy and the sum as tensors of
their own. Half of that memory traffic, and of what is kept for the backward pass, is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn
from torch.nn import functional

from lorafit.speed.lever import Lever


class _PlainBase(torch.autograd.Function):
    """On a frozen linear layer in one of the float types."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        factor_a: torch.Tensor,
        factor_b: torch.Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """x [..., in], weight [out, in], factor_a [r, in], factor_b [out, r]; products in `dtype`."""
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        within = flat @ factor_a.to(dtype).T
        out = functional.linear(flat, weight.to(dtype), None if bias is None else bias.to(dtype))
        out.addmm_(within, factor_b.to(dtype).T, alpha=scale)
        ctx.save_for_backward(flat, within, weight, factor_a, factor_b)
        ctx.scale, ctx.shape, ctx.x_dtype = scale, x.shape, x.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of x and of both factors."""
        flat, within, weight, factor_a, factor_b = ctx.saved_tensors
        of_within, of_a, of_b = _factor_gradients(gradient, flat, within, factor_a, factor_b, scale=ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient.reshape(-1, gradient.shape[-1]) @ weight.to(gradient.dtype)
            of_x.addmm_(of_within, factor_a.to(gradient.dtype))
            of_x = of_x.view(ctx.shape).to(ctx.x_dtype)
        return of_x, None, None, of_a, of_b, None, None


class _AddedTo(torch.autograd.Function):
    """On the output of a base layer of any other kind: what is quantised runs its own kernels."""

    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, x: torch.Tensor, factor_a: torch.Tensor, factor_b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """out [..., out], x [..., in], factor_a [r, in], factor_b [out, r]; products in the type of `out`."""
        flat = x.reshape(-1, x.shape[-1]).to(out.dtype)
        within = flat @ factor_a.to(out.dtype).T
        ctx.save_for_backward(flat, within, factor_a, factor_b)
        ctx.scale, ctx.shape, ctx.x_dtype = scale, x.shape, x.dtype
        total = torch.addmm(out.reshape(-1, out.shape[-1]), within, factor_b.to(out.dtype).T, alpha=scale)
        return total.view(out.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of the base's output (as it came), of x through the adapter, and of both factors."""
        flat, within, factor_a, factor_b = ctx.saved_tensors
        of_within, of_a, of_b = _factor_gradients(gradient, flat, within, factor_a, factor_b, scale=ctx.scale)
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = (of_within @ factor_a.to(gradient.dtype)).view(ctx.shape).to(ctx.x_dtype)
        return gradient, of_x, of_a, of_b, None


def _factor_gradients(
    gradient: torch.Tensor,
    flat: torch.Tensor,
    within: torch.Tensor,
    factor_a: torch.Tensor,
    factor_b: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of A·x [N, r], of A and of B, the latter two in the types of the factors."""
    flat_gradient = gradient.reshape(-1, gradient.shape[-1])
    of_within = (flat_gradient @ factor_b.to(gradient.dtype)) * scale
    of_a = (of_within.T @ flat).to(factor_a.dtype)
    # Transposed afterwards: a product whose few columns lie far apart takes half as long again.
    of_b = (within.T @ flat_gradient).T.contiguous().mul_(scale).to(factor_b.dtype)
    return of_within, of_a, of_b


class FusedLinear(Linear):
    """On a plain layer."""

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return Linear.forward(self, x, *rest, **named) if rest or named or not _applies(self) else _fused(self, x)


class FusedLinear4bit(Linear4bit):
    """On a layer in 4 bits."""

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return Linear4bit.forward(self, x, *rest, **named) if rest or named or not _applies(self) else _fused(self, x)


class FusedLinear8bit(Linear8bitLt):
    """On a layer in 8 bits."""

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return Linear8bitLt.forward(self, x, *rest, **named) if rest or named or not _applies(self) else _fused(self, x)


def _applies(layer: Linear | Linear4bit | Linear8bitLt) -> bool:
    """In training alone: evaluation stays bit for bit peft's."""
    return layer.training and not layer.disable_adapters and not layer.merged


def _fused(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    factor_a, factor_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale = layer.scaling["default"]
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else factor_a.dtype
    base = layer.base_layer
    if type(base) is nn.Linear and base.weight.dtype in (dtype, torch.float32):
        return _PlainBase.apply(x, base.weight, base.bias, factor_a, factor_b, scale, dtype)
    out = base(x)
    if out.dtype != dtype:  # the adapter is finer than the base: add in its type, then round, as peft does
        return _AddedTo.apply(out.to(dtype), x, factor_a, factor_b, scale).to(out.dtype)
    return _AddedTo.apply(out, x, factor_a, factor_b, scale)


_FUSED: dict[type, type] = {Linear: FusedLinear, Linear4bit: FusedLinear4bit, Linear8bitLt: FusedLinear8bit}


def why_not(layer: LoraLayer) -> str | None:
    """Why a LoRA layer keeps peft's forward pass; None where both give the same."""
    if list(layer.lora_A) != ["default"]:
        return "more than one adapter"
    if "default" in layer.lora_variant:
        return "DoRA or another variant"
    if layer.lora_bias["default"]:
        return "lora_bias"
    if not isinstance(layer.lora_dropout["default"], nn.Identity):
        return "lora_dropout"
    if any(parameter.requires_grad for parameter in layer.base_layer.parameters()):
        return "a trained bias"
    return None


def fuse(model: nn.Module) -> tuple[int, dict[str, int]]:
    """Give the LoRA layers that allow it the fused forward pass; how many have it, and others by their reason.

    Nothing else of a layer changes: what saves, merges or unloads it sees peft's own.
    """
    fused = 0
    kept: dict[str, int] = {}
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or type(layer) not in _FUSED:
            continue
        reason = why_not(layer)
        if reason is None:
            layer.__class__ = _FUSED[type(layer)]
            fused += 1
        else:
            kept[reason] = kept.get(reason, 0) + 1
    return fused, kept


def _engage(model: nn.Module) -> str:
    fused, kept = fuse(model)
    others = ", ".join(f"{count} of them keep peft's: {reason}" for reason, count in kept.items())
    return f" {fused} of {fused + sum(kept.values())} modules" + (f"; {others}" if others else "")


LEVER = Lever(
    key="fused_lora",
    name="fused LoRA",
    why_not=lambda model, recipe, dtype: None,  # each layer has reasons of its own
    engage=_engage,
    is_planned=lambda model, on_cuda, in_16_bits: True,
)
