"""Every tensor of the merged model, decided before a byte is written: its source, its change, its file."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.builders.model_files import BaseModelFiles
from lorafit.builders.weight_files import FLOATS, ITEM_BITS, WEIGHTS, TensorInfo
from lorafit.errors import ModelError, Problem
from lorafit.merging.adapted_model import AdaptedModel, adapted_model
from lorafit.merging.adapter_files import Adapter
from lorafit.merging.deltas import AddLowRank, Change, ReplaceRows, is_same
from lorafit.merging.disk_names import Slice
from lorafit.tasks import model_kind

STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Piece:
    """One change, or none, on some rows of one tensor."""

    change: Change | None
    """None where only the type changes."""
    expert: int | None
    first: int
    """Row of the parameter (of the expert) that the change counts from."""
    row: int
    """Row of the tensor that is row `first` of the parameter."""
    rows: int


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the merged model."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | Tensor
    """A tensor of the base, which may have fewer rows, or one that the adapter holds whole."""
    pieces: tuple[Piece, ...] = ()

    @property
    def nbytes(self) -> int:
        """As it is written."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8

    @property
    def is_copy(self) -> bool:
        """Whether it is the base's, byte for byte."""
        return isinstance(self.source, TensorInfo) and not self.pieces and self.source.dtype == self.dtype


@dataclass(frozen=True)
class OutputShard:
    """One file of the merged model."""

    file: str
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class MergePlan:
    """What is written, and from what."""

    base_directory: Path
    shards: tuple[OutputShard, ...]
    config: Mapping[str, Any]
    """config.json of the merged model."""
    peft_reason: str | None
    """Why peft must merge this in memory instead; then there are no shards."""
    changed: int
    """Parameters that the adapter changes."""
    total_bytes: int
    """Bytes of all tensors that are written."""

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name to file name."""
        return {tensor.name: shard.file for shard in self.shards for tensor in shard.tensors}


def plan_merge(
    adapter: Adapter, base_files: BaseModelFiles, *, dtype: str | None, max_shard_size: int | None
) -> MergePlan:
    """How to merge `adapter` into its base.

    `dtype` is the type of every weight; None keeps each tensor's own. `max_shard_size` is bytes in one file; None keeps
    the base's files. Raises AdapterError or ModelError when the two do not fit together.
    """
    # Which parameters stay float32 is only asked when the type changes.
    model = adapted_model(adapter, base_files, dtype=getattr(torch, dtype or "float32"))
    touched = sorted(model.changes.keys() | model.values.keys())
    obstacles = [*model.obstacles, *_converted(model, touched)]
    if obstacles:
        size = base_files.total_bytes * (2 if dtype == "float32" else 1)
        return MergePlan(base_files.directory, (), {}, "; ".join(obstacles[:3]), len(touched), size)
    _refuse_other_shapes(model, base_files, touched)
    outputs = {name: _copied(name, tensor, dtype) for name, tensor in _kept(model, base_files).items()}
    untied = [group for group in model.tied if not _is_still_tied(model, group)]
    for parameter in touched:
        for tensor in _changed(parameter, model, base_files, dtype=dtype):
            outputs[tensor.name] = tensor
    for parameter in (name for group in untied for name in group if name not in touched):
        for slice_ in _slices(parameter, model):
            source = base_files.tensors[slice_.tensor]
            name = slice_.tensor if parameter in model.on_disk.slices else parameter
            outputs[name] = _copied(name, source, dtype)
    for parameter in model.float32 if dtype else ():
        for slice_ in model.on_disk.slices.get(parameter, ()):
            if outputs[slice_.tensor].dtype in FLOATS:
                outputs[slice_.tensor] = replace(outputs[slice_.tensor], dtype="F32")
    tensors = list(outputs.values())
    return MergePlan(
        base_directory=base_files.directory,
        shards=tuple(_shards(tensors, base_files, max_shard_size)),
        config=_config(adapter, base_files, model, dtype=dtype, is_untied=bool(untied)),
        peft_reason=None,
        changed=len(touched),
        total_bytes=sum(tensor.nbytes for tensor in tensors),
    )


def _converted(model: AdaptedModel, touched: Sequence[str]) -> Iterator[str]:
    converted = model.on_disk.converted
    steps = ", ".join(sorted(set(converted.values())))
    for parameter in touched:
        # Of a tensor that is cut into several parameters only the first is known by name.
        is_cut = bool(converted) and parameter in model.shapes and not _slices(parameter, model)
        if parameter in converted or is_cut:
            yield f"{parameter} lies in its files in another form ({converted.get(parameter, steps)})"


def _kept(model: AdaptedModel, base_files: BaseModelFiles) -> dict[str, TensorInfo]:
    """The base's tensors in the order of its files; without those that only the base's own head needs."""
    ordered = sorted(base_files.tensors.items(), key=lambda item: (item[1].file, item[1].start))
    drops = model.class_name not in (base_files.config.get("architectures") or [model.class_name])
    return {name: tensor for name, tensor in ordered if not (drops and name in model.on_disk.unused)}


def _refuse_other_shapes(model: AdaptedModel, base_files: BaseModelFiles, touched: Sequence[str]) -> None:
    problems = []
    for parameter, slices in model.on_disk.slices.items():
        if parameter in model.values:
            continue
        shape, held = model.shapes[parameter], [base_files.tensors[slice_.tensor].shape for slice_ in slices]
        elements = sum(math.prod(one) for one in held)
        if parameter in touched and _is_grown(model.changes.get(parameter), held, shape):
            continue
        if elements != math.prod(shape) or (len(held) == 1 and held[0] != tuple(shape)):
            problems.append(
                f"holds {slices[0].tensor} as {list(held[0])}, the model with this adapter has {parameter} as "
                f"{list(shape)}: this is not the base it was trained on"
            )
    for parameter in touched:
        if parameter not in model.shapes:
            problems.append(f"gives {parameter} to a layer that has none (lora_bias): no merged model can hold it")
        elif parameter not in model.values and not _slices(parameter, model):
            problems.append(f"has no {parameter}, which the adapter changes: this is not the base it was trained on")
    if problems:
        raise ModelError(Problem(base_files.name, problem) for problem in problems)


def _is_grown(change: Change | None, held: Sequence[tuple[int, ...]], shape: torch.Size) -> bool:
    """Whether the adapter brings the rows that the base does not have: those of new tokens."""
    if not isinstance(change, ReplaceRows) or len(held) != 1 or held[0][1:] != tuple(shape[1:]):
        return False
    return set(range(held[0][0], shape[0])) <= set(change.rows.tolist())


def _slices(parameter: str, model: AdaptedModel) -> tuple[Slice, ...]:
    """Where a parameter lies on disk, under its own or another name of the same weight."""
    group = next((group for group in model.tied if parameter in group), ())
    return next((model.on_disk.slices[name] for name in (parameter, *group) if name in model.on_disk.slices), ())


def _is_still_tied(model: AdaptedModel, group: Sequence[str]) -> bool:
    """Whether the adapter changes all names of one weight alike."""
    first = group[0]
    return all(
        is_same(model.changes.get(first), model.changes.get(name))
        and is_same(model.values.get(first), model.values.get(name))
        for name in group[1:]
    )


def _copied(name: str, source: TensorInfo, dtype: str | None) -> OutputTensor:
    stored = STORED[dtype] if dtype and source.dtype in FLOATS else source.dtype
    return OutputTensor(name=name, dtype=stored, shape=source.shape, source=source)


def _changed(
    parameter: str, model: AdaptedModel, base_files: BaseModelFiles, *, dtype: str | None
) -> Iterator[OutputTensor]:
    """The tensors on disk of one parameter, with its change; none where another name of the same weight has them."""
    change, value = model.changes.get(parameter), model.values.get(parameter)
    group = next((group for group in model.tied if parameter in group), ())
    is_own = parameter in model.on_disk.slices
    if not is_own and group and _is_still_tied(model, group):
        return
    slices = _slices(parameter, model)
    if not slices:
        assert value is not None  # _refuse_other_shapes
        stored = STORED[dtype] if dtype else _usual_dtype(base_files)
        yield OutputTensor(name=parameter, dtype=stored, shape=tuple(value.shape), source=value)
    for slice_ in slices:
        tensor = _copied(slice_.tensor if is_own else parameter, base_files.tensors[slice_.tensor], dtype)
        if isinstance(change, ReplaceRows):
            tensor = replace(tensor, shape=tuple(model.shapes[parameter]))
        if value is not None:
            part = value if slice_.expert is None else value[slice_.expert]
            if len(slices) > 1:
                part = part[slice_.first : slice_.first + tensor.shape[0]]
            tensor = replace(tensor, source=part, shape=tuple(part.shape))
        yield replace(tensor, pieces=tuple(_pieces(change, slice_, tensor.shape)) if change else ())


def _pieces(change: Change, slice_: Slice, shape: tuple[int, ...]) -> Iterator[Piece]:
    if isinstance(change, AddLowRank) and len(shape) == 3:
        for expert in range(shape[0]):
            yield Piece(change, expert, 0, expert * shape[1], shape[1])
    else:
        yield Piece(change, slice_.expert, slice_.first, 0, shape[0])


def _usual_dtype(base_files: BaseModelFiles) -> str:
    sizes: dict[str, int] = {}
    for tensor in base_files.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max((dtype for dtype in sizes if dtype in FLOATS), key=lambda dtype: sizes[dtype], default="F32")


def _shards(
    tensors: Sequence[OutputTensor], base_files: BaseModelFiles, max_shard_size: int | None
) -> Iterator[OutputShard]:
    if max_shard_size is None:
        last = max(tensor.file for tensor in base_files.tensors.values())
        files: dict[str, list[OutputTensor]] = {}
        for tensor in tensors:
            file = base_files.tensors[tensor.name].file if tensor.name in base_files.tensors else last
            files.setdefault(file, []).append(tensor)
        groups = list(files.values())
    else:
        groups, size = [[]], 0
        for tensor in tensors:
            if groups[-1] and size + tensor.nbytes > max_shard_size:
                groups.append([])
                size = 0
            groups[-1].append(tensor)
            size += tensor.nbytes
    for index, group in enumerate(groups, start=1):
        name = WEIGHTS if len(groups) == 1 else f"model-{index:05}-of-{len(groups):05}.safetensors"
        # The widest type first, so that each number begins at a multiple of its size; else in the base's order.
        yield OutputShard(file=name, tensors=tuple(sorted(group, key=lambda tensor: -ITEM_BITS[tensor.dtype])))


def _config(
    adapter: Adapter, base_files: BaseModelFiles, model: AdaptedModel, *, dtype: str | None, is_untied: bool
) -> dict[str, Any]:
    """config.json of the base, changed only where the merged model differs."""
    config = copy.deepcopy(dict(base_files.config))
    config.pop("_name_or_path", None)  # where the base lay on some machine
    parts = [value for value in config.values() if isinstance(value, dict)]
    for section in (config, *parts):
        stored = [section.pop(key) for key in ("torch_dtype", "dtype") if key in section]
        if stored or (dtype and section is config):
            section["dtype"] = dtype or stored[-1]
    text_config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    vocab_size = model.config.get_text_config().vocab_size
    if text_config.get("vocab_size", vocab_size) != vocab_size:
        text_config["vocab_size"] = vocab_size
    if is_untied:
        config["tie_word_embeddings"] = text_config["tie_word_embeddings"] = False
    if not model_kind(adapter.config.get("task_type")).is_kept_by_base:
        config["architectures"] = [model.class_name]
        labels = model.config.to_dict()
        config |= {key: labels[key] for key in ("id2label", "label2id") if key in labels}
    return config
