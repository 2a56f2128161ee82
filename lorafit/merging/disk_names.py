"""Where each parameter of a model in memory lies in its files: whole, renamed, or in pieces (experts, fused weights).

transformers renames and fuses tensors while it loads them; the same rules, its own, are asked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lorafit.builders.weight_files import TensorInfo

get_checkpoint_conversion_mapping("llama")  # compiles the rules of all: once, also for copies of this process


@dataclass(frozen=True)
class Slice:
    """The rows of a parameter that one tensor on disk holds, all of that tensor."""

    tensor: str
    expert: int | None
    """Index into the first of the parameter's three dimensions; None when the tensor has as many dimensions as it."""
    first: int
    """First row, within the expert if there is one."""


@dataclass(frozen=True)
class DiskNames:
    """What lies where."""

    slices: Mapping[str, tuple[Slice, ...]]
    """By parameter name in memory."""
    converted: Mapping[str, str]
    """Parameters that are made from their files by more than stacking and concatenating: the operations' names."""
    unused: frozenset[str]
    """Tensors on disk that the model has no place for."""

    def name_for(self, parameter: str) -> str:
        """The name a parameter that is not on disk (it was tied, or is new) gets there: loading finds it by its own."""
        held = self.slices.get(parameter)
        return held[0].tensor if held else parameter


def disk_names(model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> DiskNames:
    """Match every tensor on disk with a parameter of `model` (which may be on the meta device)."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    slices: dict[str, tuple[Slice, ...]] = {}
    groups: dict[str, dict[str, list[str]]] = {}
    unused = []
    for name in sorted(tensors, key=dot_natural_key):
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if parameter not in state and name in state:
            parameter, pattern = rename_source_key(name, [], [], prefix, state)
        if parameter not in state:
            unused.append(name)
        elif pattern is None:
            slices[parameter] = (Slice(name, None, 0),)
        else:
            groups.setdefault(parameter, {}).setdefault(pattern, []).append(name)
    converted = {}
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    for parameter, sources in groups.items():
        rule = by_pattern[next(iter(sources))]
        ordered = [sources[pattern] for pattern in rule.source_patterns if pattern in sources]
        if _operations(rule) in (_STACKED, _STACKED_AND_FUSED) and state[parameter].dim() == 3:
            slices[parameter] = tuple(_slices_of_experts(ordered, tensors))
        elif _operations(rule) == _FUSED:
            slices[parameter] = tuple(_fused_slices((names[0] for names in ordered), tensors))
        else:
            converted[parameter] = ", ".join(type(operation).__name__ for operation in rule.operations)
    return DiskNames(slices=slices, converted=converted, unused=frozenset(unused))


_STACKED = ((MergeModulelist, 0),)
_STACKED_AND_FUSED = ((MergeModulelist, 0), (Concatenate, 1))
_FUSED = ((Concatenate, 0),)


def _operations(rule: WeightConverter) -> tuple[tuple[type, int | None], ...]:
    if len(rule.target_patterns) != 1:
        return ()
    known = (MergeModulelist, Concatenate)
    return tuple((type(step), step.dim if isinstance(step, known) else None) for step in rule.operations)


def _slices_of_experts(sources: list[list[str]], tensors: Mapping[str, TensorInfo]) -> Iterable[Slice]:
    for experts in zip(*sources, strict=True):
        for slice_ in _fused_slices(experts, tensors):
            yield Slice(slice_.tensor, sources[0].index(experts[0]), slice_.first)


def _fused_slices(names: Iterable[str], tensors: Mapping[str, TensorInfo]) -> Iterable[Slice]:
    first = 0
    for name in names:
        yield Slice(name, None, first)
        first += tensors[name].shape[0]


def float32_names(model: PreTrainedModel, parameters: Iterable[str], *, dtype: torch.dtype) -> frozenset[str]:
    """Parameters that transformers keeps in float32 when it loads the model in `dtype`."""
    patterns = [re.compile(glob.replace("*", ".*")) for glob in model._get_dtype_plan(dtype)]
    return frozenset(name for name in parameters if any(pattern.search(name) for pattern in patterns))
