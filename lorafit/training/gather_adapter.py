"""The adapter of a model that is spread over processes, whole again. Every process takes part."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from lorafit.training.processes import distribution

_ADAPTER_PARTS = ("lora_", "modules_to_save.", "trainable_tokens_", "ranknum")


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor of this name was put there by peft."""
    return any(part in name for part in _ADAPTER_PARTS)


def whole_adapter(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """Name to tensor, on CPU, in the first process; empty in the others; None where each process holds it whole.

    The library's own way gathers the whole base too, which is what does not fit.
    """
    match distribution(trainer.accelerator):
        case "FSDP2":
            assert trainer.model is not None
            return gathered_adapter(trainer.model)
        case "ZeRO-3":
            engine: Any = trainer.model_wrapped  # deepspeed's
            return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True) or {}
    return None


def gathered_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    """The same for a model that torch's `fully_shard` has spread: one tensor after the other, the base left out."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {}
    for name, tensor in model.state_dict().items():
        if name not in trained and not is_adapter_tensor(name):
            continue
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if PartialState().is_main_process:
            whole[name] = full.detach().cpu()
    return whole
