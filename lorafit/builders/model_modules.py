"""The modules of a model in memory, as a `lora` section names them. No peft."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafit.builders.modules import Modules


def weight_of(layer: nn.Module) -> Tensor:
    """Of an embedding, or of an output head."""
    return cast(Tensor, layer.weight)  # torch types every attribute `Tensor | Module`


def modules_of(model: PreTrainedModel) -> Modules:
    """What a `lora` section can name in a model."""
    named = [(name, module) for name, module in model.named_modules() if name]
    shapes = {name: _shape(module) for name, module in named if is_adaptable(module)}
    head, rows = model.get_output_embeddings(), weight_of(model.get_input_embeddings()).shape[0]
    beside = [name for name, module in named if isinstance(module, nn.Embedding) or module is head]
    parameters = tuple(name for name, _ in model.named_parameters())
    return Modules(tuple(name for name, _ in named), shapes, parameters, frozenset(beside), int(rows))


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of its weight as it is meant: 4-bit layers hold it packed."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(module.get_parameter("weight").shape)


def is_adaptable(module: nn.Module) -> bool:
    """Whether PEFT can put a LoRA adapter on this module: linear layers (quantised or not), Conv1D, embeddings."""
    return isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"
