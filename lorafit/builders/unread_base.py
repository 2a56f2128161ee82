"""The base model of a process that is given its weights by another: every parameter on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorafit.builders.auto_class import auto_class
from lorafit.tasks import DEFAULT_TASK, Task


@dataclass(frozen=True)
class BaseLayout:
    """All of a loaded base but its weights."""

    config: PreTrainedConfig
    dtype: torch.dtype
    dtypes: dict[str, torch.dtype]
    """Of every parameter: some architectures keep a few in float32."""


def layout_of(base: PreTrainedModel) -> BaseLayout:
    """What `unread_base` needs."""
    return BaseLayout(base.config, base.dtype, {name: p.dtype for name, p in base.named_parameters()})


def unread_base(layout: BaseLayout, *, task: Task = DEFAULT_TASK) -> PreTrainedModel:
    """The same model without a weight. Its buffers are real: no checkpoint holds them all, and nobody hands them on."""
    with init_empty_weights(include_buffers=False):
        base = auto_class(task.model).from_config(
            layout.config, dtype=layout.dtype, attn_implementation=layout.config._attn_implementation
        )
    base.eval()  # as from_pretrained leaves it
    base.tie_weights()  # on its way to meta every parameter became one of its own
    for name, parameter in base.named_parameters():
        parameter.data = parameter.data.to(layout.dtypes[name])
    return base


def hold_trained(model: nn.Module) -> None:
    """Memory for what is trained, which peft puts beside the weights of the base, on meta.

    accelerate 1.15 finds an optimizer's parameters again by their address (`Accelerator._prepare_fsdp2`), and on meta
    all have the same: without a word one parameter would be trained in the place of all.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and parameter.requires_grad:
                module.register_parameter(name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))
