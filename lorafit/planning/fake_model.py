"""A model on meta as fake CPU tensors, and its decoder layers, some of which stand for all."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_KEPT_BY_4BIT = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized")


def materialise(model: nn.Module, mode: AbstractContextManager[Any], *, device: str = "cpu") -> None:
    """Every meta tensor of `model` becomes one of `mode`, fake or real, and stays unwritten; shapes, types, ties and
    4-bit states remain. In place, because `Module.to` cannot do it."""
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: Any) -> Any:
        if tensor is None or tensor.device.type != "meta":
            return tensor
        if id(tensor) not in fakes:
            with mode:
                fakes[id(tensor)] = torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
                )
        return fakes[id(tensor)]

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            state = getattr(parameter, "quant_state", None)
            if id(parameter) not in parameters:
                with mode:
                    made: Any = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
                if state is not None:
                    for key in _KEPT_BY_4BIT:
                        setattr(made, key, getattr(parameter, key))
                    made.quant_state = module.quant_state = _fake_state(state, fake)
                parameters[id(parameter)] = made
            module._parameters[name] = parameters[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = fake(buffer)


def _fake_state(state: Any, fake: Any) -> Any:
    made = copy.copy(state)
    for key in ("absmax", "code", "offset"):
        setattr(made, key, fake(getattr(made, key)))
    if made.state2 is not None:
        made.state2 = copy.copy(made.state2)
        for key in ("absmax", "code"):
            setattr(made.state2, key, fake(getattr(made.state2, key)))
    return made


@dataclass(frozen=True)
class Sample:
    """Which layers of a deep model are run, and how often each kind is in it."""

    base: tuple[int, ...]
    """Indices of the shortest run: the first and the last layer of each kind."""
    extras: tuple[tuple[int, int], ...]
    """(index of one more layer, how many layers of its kind the base leaves out), a kind each."""


class Layers:
    """The decoder layers of a model; `keep` leaves some of them in it."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._config = base.config.get_text_config()
        depth = self._config.num_hidden_layers
        self._name, self._list = next(
            (name, module)
            for name, module in base.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth
        )
        self.all = tuple(self._list)
        self._per_layer = {
            key: list(value)
            for key, value in vars(self._config).items()
            if isinstance(value, list | tuple) and len(value) == depth
        }

    def keep(self, indices: Sequence[int]) -> None:
        """The model is now as deep as `indices` are many."""
        self._list._modules = OrderedDict((str(place), self.all[index]) for place, index in enumerate(indices))
        self._config.num_hidden_layers = len(indices)
        for key, values in self._per_layer.items():
            setattr(self._config, key, [values[index] for index in indices])

    def of(self, model: PeftModel) -> list[nn.Module]:
        """Those that were kept, in the model around them or in a copy of it."""
        return list(model.get_base_model().get_submodule(self._name).children())

    def sample(self, *, ends: int = 1) -> Sample:
        """The layers to run: `ends` of each kind at either end, and one more of it.

        Layers are of one kind when the config says the same of them and their parameters have the same names, shapes,
        types and gradients.
        """
        kinds: dict[Any, list[int]] = {}
        for index, layer in enumerate(self.all):
            said = tuple(str(values[index]) for values in self._per_layer.values())
            held = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
            kinds.setdefault((said, held), []).append(index)
        base = sorted({index for members in kinds.values() for index in (*members[:ends], *members[-ends:])})
        if len(self.all) <= len(base) + len(kinds):
            return Sample(tuple(range(len(self.all))), ())
        left = ([index for index in members if index not in base] for members in kinds.values())
        return Sample(tuple(base), tuple((members[0], len(members)) for members in left if members))


def depth_of(config: PreTrainedConfig) -> int:
    """Decoder layers."""
    return config.get_text_config().num_hidden_layers
