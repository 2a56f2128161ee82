"""The modules of a base model that an adapter can name, as far as its files tell them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lorafit.builders.weight_files import TensorInfo
from lorafit.recipe.rules.adapter import EMBEDDINGS, HEADS

POSITIONS = ("wpe", "embed_positions")

CALLED_AS_ON_DISK = {
    **dict.fromkeys(("gpt2", "falcon", "bloom"), "transformer"),
    **dict.fromkeys(
        (
            *("arcee", "cohere", "cohere2", "gemma", "gemma2", "glm", "glm4", "granite", "helium", "llama", "mistral"),
            *("nemotron", "olmo", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3"),
            *("stablelm", "starcoder2"),
        ),
        "model",
    ),
}
"""Architectures whose modules are called as their tensors on disk, and what their names begin with. Others are renamed
or fused when they are loaded (transformers' conversion_mapping), or were never looked at."""


@dataclass(frozen=True)
class Modules:
    """What a `lora` section can name."""

    names: tuple[str, ...]
    """Every module, in the model's order."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the weight of each module that an adapter can sit on: (out, in), or (in, out) where that is how it is kept."""
    parameters: tuple[str, ...]
    beside_layers: frozenset[str]
    """Embeddings and output head, by name: `all-linear` leaves them out."""
    rows: int
    """Of the embedding: token ids run up to it."""


def modules_on_disk(tensors: Mapping[str, TensorInfo], *, config: Mapping[str, Any]) -> Modules | None:
    """The modules of an architecture that is CALLED_AS_ON_DISK; None of another."""
    prefix = CALLED_AS_ON_DISK.get(config["model_type"])
    if prefix is None:
        return None
    has_prefix = any(name.startswith(f"{prefix}.") for name in tensors)  # GPT-2's own files lack it
    named = {_in_memory(name, "" if has_prefix else f"{prefix}."): tensor for name, tensor in tensors.items()}
    shapes = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in named.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }
    embedding = next(name for name in shapes if name.rpartition(".")[2] in EMBEDDINGS)
    if not any(name in HEADS for name in shapes):  # tied, and so not on disk
        shapes[HEADS[0]] = shapes[embedding]
    names = [*accumulate_of(named), *shapes]
    beside = [name for name in shapes if name.rpartition(".")[2] in (*EMBEDDINGS, *POSITIONS, *HEADS)]
    return Modules(tuple(dict.fromkeys(names)), shapes, tuple(named), frozenset(beside), shapes[embedding][0])


def _in_memory(name: str, prefix: str) -> str:
    return name if name.partition(".")[0] in HEADS else prefix + name


def accumulate_of(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """`a`, `a.b` of a tensor `a.b.weight`: the modules that it lies in."""
    return [module for name in tensors for module in accumulate(name.split(".")[:-1], "{}.{}".format)]
