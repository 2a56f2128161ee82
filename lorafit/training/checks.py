"""What must hold before and after training: exactly the adapter is trained, all of it moved, nothing else did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn

from lorafit.errors import VerificationError

_ADAPTER_PARTS = ("lora_", "modules_to_save.", "trainable_tokens_", "ranknum")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of all that requires a gradient."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def refuse_wrong_trainable_set(model: PeftModel, *, bias: str) -> None:
    """Before training: every trainable tensor belongs to the adapter, and every adapter tensor is trainable.

    Raises VerificationError, which here is a bug of ours or of peft's, naming the tensors.
    """
    strangers, frozen = [], []
    for name, parameter in model.named_parameters():
        is_adapter = any(part in name for part in _ADAPTER_PARTS) or (bias != "none" and name.endswith("bias"))
        if parameter.requires_grad and not is_adapter:
            strangers.append(name)
        if not parameter.requires_grad and "lora_" in name and not name.endswith("ranknum"):
            frozen.append(name)
    if strangers:
        raise VerificationError(f"{_listed(strangers)} of the base would be trained too", where="adapter")
    if frozen:
        raise VerificationError(f"{_listed(frozen)} of the adapter would not be trained", where="adapter")
    if not trainable(model):
        raise VerificationError("nothing to train: the adapter has no parameters", where="adapter")


@dataclass(frozen=True)
class Before:
    """What the tensors were before the first step."""

    moving: dict[str, torch.Tensor]
    """A copy, on CPU, of every trainable tensor."""

    frozen: dict[str, int]
    """A hash of the bytes of every frozen tensor."""


def remember(model: nn.Module) -> Before:
    """Take down what `verify_result` compares with: the memory of one adapter, and one pass over the base."""
    parameters = dict(model.named_parameters())
    return Before(
        moving={name: _local(p).detach().cpu().clone() for name, p in parameters.items() if p.requires_grad},
        frozen={name: _hash(p) for name, p in parameters.items() if not p.requires_grad},
    )


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _hash(parameter: torch.Tensor) -> int:
    local = _local(parameter).detach()
    if local.numel() == 0:
        return 0
    flat = local.contiguous().view(-1)
    # A xor of all words: it misses two equal changes, but an update by mistake changes a tensor all over.
    return int(torch.hash_tensor(flat.view(_INTEGER_OF_SIZE[flat.element_size()])).item())


_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify_result(
    model: nn.Module, *, before: Before, steps_done: int, steps_planned: int, stopped_early: bool
) -> None:
    """After training: as many steps as planned, every trainable tensor moved and finite, the base as it was.

    Raises VerificationError naming what failed.
    """
    if steps_done == 0 or (steps_done != steps_planned and not stopped_early):
        raise VerificationError(f"{steps_done} of {steps_planned} planned steps were done", where="training")
    still, broken, changed = [], [], []
    for name, parameter in model.named_parameters():
        local = _local(parameter).detach()
        if name in before.moving:
            if not torch.isfinite(local).all():
                broken.append(name)
            elif torch.equal(local.cpu(), before.moving[name]) and local.numel():
                still.append(name)
        elif name in before.frozen and _hash(parameter) != before.frozen[name]:
            changed.append(name)
    if broken:
        raise VerificationError(f"{_listed(broken)} not finite; the adapter was not saved", where="adapter")
    if changed:
        raise VerificationError(
            f"{_listed(changed)} of the frozen base changed; the adapter was not saved", where="base"
        )
    if still:
        message = f"{_listed(still)} did not move: nothing was learned there"
        raise VerificationError(
            f"{message}; look at learning_rate, the trained share of tokens and targets", where="adapter"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
