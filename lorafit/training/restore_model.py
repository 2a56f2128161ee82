"""A model that is tried out, and afterwards is what it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import PreTrainedModel


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Whatever the block does to `model` is undone: modules, hooks, flags and settings, weights that are trained (give
    them new tensors rather than change those they have), gradients; the random states; the loaders that
    accelerate lists, and what its latest user sets for all others: precision, and whether they compile."""
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    settings = [base.config, base.config.get_text_config(), base.generation_config]
    owners = [*model.modules(), *(one for one in settings if one is not None), GradientState()]
    shared = [PartialState._shared_state, AcceleratorState._shared_state]
    before = [(attributes, _contents(attributes)) for attributes in [*map(vars, owners), *shared]]
    trained = [(p, p.data, p.grad) for p in model.parameters() if p.requires_grad]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        for attributes, contents in before:
            _put_back(attributes, contents)
        for parameter, data, gradient in trained:
            parameter.data, parameter.grad = data, gradient
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


def _contents(attributes: MutableMapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and a copy of it where it is a collection that may be changed in place."""
    kinds = (dict, list, set)
    return {name: (value, copy.copy(value) if isinstance(value, kinds) else None) for name, value in attributes.items()}


def _put_back(attributes: MutableMapping[str, Any], contents: dict[str, tuple[Any, Any]]) -> None:
    attributes.clear()
    for name, (value, inside) in contents.items():
        attributes[name] = value
        if isinstance(inside, list):
            value[:] = inside
        elif inside is not None:
            value.clear()
            value.update(inside)
