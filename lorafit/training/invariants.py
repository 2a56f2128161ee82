"""What must hold before and after training: exactly the adapter is trained, all of it moved, nothing else did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from lorafit.errors import VerificationError
from lorafit.training.gather_adapter import is_adapter_tensor, whole_adapter
from lorafit.training.trainer.run_trainer import RunTrainer


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of all that requires a gradient."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def refuse_wrong_trainable_set(model: PeftModel, *, bias: str) -> None:
    """Before training: every trainable tensor belongs to the adapter, and every adapter tensor is trainable.

    Raises VerificationError, which here is a bug of ours or of peft's, naming the tensors.
    """
    strangers, frozen = [], []
    for name, parameter in model.named_parameters():
        is_adapter = is_adapter_tensor(name) or (bias != "none" and name.endswith("bias"))
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

    frozen: dict[str, int | None]
    """A hash of the bytes of every frozen tensor; None in a process that is yet to be given it."""


def remember(model: nn.Module) -> Before:
    """Take down what `verify_result` compares with: the memory of one adapter, and one pass over the base."""
    parameters = dict(model.named_parameters())
    return Before(
        moving={name: p.detach().cpu().clone() for name, p in parameters.items() if p.requires_grad and not p.is_meta},
        frozen={name: None if p.is_meta else _hash(p) for name, p in parameters.items() if not p.requires_grad},
    )


def _hash(parameter: torch.Tensor) -> int:
    """Of a tensor that FSDP2 has spread: of the whole of it, gathered for the moment by every process."""
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    if whole.numel() == 0:
        return 0
    flat = whole.detach().contiguous().view(-1)
    # A xor of all words: it misses two equal changes, but an update by mistake changes a tensor all over.
    return int(torch.hash_tensor(flat.view(_INTEGER_OF_SIZE[flat.element_size()])).item())


_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def verified_adapter(model: nn.Module, trainer: RunTrainer, *, before: Before) -> dict[str, torch.Tensor] | None:
    """The adapter as `whole_adapter` gathers it, after all that `verify_result` holds it to."""
    gathered = whole_adapter(trainer)
    verify_result(
        model,
        before=before,
        gathered=gathered,
        steps_done=trainer.state.global_step,
        steps_planned=trainer.steps,
        stopped_early=trainer.is_stopped_early(),
        updates=trainer.updates.count,
    )
    return gathered


def verify_result(
    model: nn.Module,
    *,
    before: Before,
    gathered: dict[str, torch.Tensor] | None,
    steps_done: int,
    steps_planned: int,
    stopped_early: bool,
    updates: int,
) -> None:
    """After training: as many steps as planned, every trainable tensor whole, moved and finite, the base as it was.

    `updates` is how many of the steps could move a weight. `gathered` is the adapter of a model that is spread over
    processes: whole in the first, empty in the others, which only take part. Raises VerificationError naming what
    failed.
    """
    if steps_done == 0 or (steps_done != steps_planned and not stopped_early):
        raise VerificationError(f"{steps_done} of {steps_planned} planned steps were done", where="training")
    parameters = dict(model.named_parameters())
    # DeepSpeed leaves nothing of a weight it has spread: there is nothing to compare with what was there before.
    comparable = {name: parameters[name] for name in before.frozen if name in parameters and parameters[name].numel()}
    # Every process takes part in every hash, also where it has nothing to compare it with.
    after = {name: _hash(parameter) for name, parameter in comparable.items()}
    changed = [name for name, found in after.items() if before.frozen[name] not in (found, None)]
    if gathered is not None and not PartialState().is_main_process:
        return
    _refuse_partial(before, gathered)
    trained = parameters if gathered is None else gathered
    still, broken = [], []
    for name, start in before.moving.items():
        end = trained[name].detach()
        if not torch.isfinite(end).all():
            broken.append(name)
        elif torch.equal(end.cpu(), start.to(end.dtype)):  # a spread adapter may have been widened
            still.append(name)
    still = _without_pruned(still, before)
    if updates == 1:
        still = _without_waiting(still, before)
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


def _without_pruned(still: list[str], before: Before) -> list[str]:
    """Without the E of modules that AdaLoRA pruned to rank 0: zero, as it began. All E at zero are a fault."""
    values = [name for name in before.moving if "lora_E" in name]
    pruned = {name for name in still if "lora_E" in name}
    return still if len(pruned) == len(values) else [name for name in still if name not in pruned]


def _without_waiting(still: list[str], before: Before) -> list[str]:
    """Without those that one update cannot move: A has no gradient while B is zero, nor A and B while AdaLoRA's E is.
    The one that began at zero has moved, or none of them may stay behind."""
    moved = {_module_of(name) for name, start in before.moving.items() if name not in still and not start.any()}
    return [name for name in still if _module_of(name) not in moved or not before.moving[name].any()]


def _module_of(name: str) -> str:
    return name.partition(".lora_")[0]


def _refuse_partial(before: Before, gathered: dict[str, torch.Tensor] | None) -> None:
    """What was gathered has every tensor in its full shape, and none is blank: adapters of 40 bytes have been saved."""
    if gathered is None:
        return
    partial = [
        name
        for name, start in before.moving.items()
        if name not in gathered or gathered[name].shape != start.shape or not gathered[name].any()
    ]
    if partial:
        message = f"{_listed(partial)} did not come together from the processes; the adapter was not saved"
        raise VerificationError(message, where="adapter")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
