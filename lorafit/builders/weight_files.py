"""The safetensors files of a base model: their table of contents, whether they are whole, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError, Problem
from lorafit.storage.json_text import parsed

ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
FLOATS = ("F64", "F32", "F16", "BF16")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
SAMPLES_PER_TENSOR, SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    file: str
    dtype: str
    """As the file spells it: `BF16`, `F32`."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    nbytes: int


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file only stands for one that git-lfs has not fetched."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def tensors_in(path: Path) -> dict[str, TensorInfo]:
    """Name to place of every tensor of one file, from its header. Raises ModelError when the file is not whole."""
    size = path.stat().st_size
    if is_lfs_pointer(path):
        raise ModelError("is a git-lfs pointer, not weights: run `git lfs pull` in that directory", where=str(path))
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, LONGEST_HEADER):
            raise ModelError(f"is not a whole safetensors file ({size:,} bytes): copy it again", where=str(path))
        header = file.read(header_bytes)
    try:
        entries = parsed(header)
        entries.pop("__metadata__", None)
        first = 8 + header_bytes
        table = {name: _tensor(path.name, entry, first=first) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError("has a header that is not safetensors: copy the file again", where=str(path)) from None
    promised = max((tensor.start + tensor.nbytes for tensor in table.values()), default=first)
    if size != promised:
        raise ModelError(
            f"has {size:,} bytes, its header promises {promised:,}: the copy broke off, copy it again", where=str(path)
        )
    end = first
    for name, tensor in sorted(table.items(), key=lambda entry: entry[1].start):
        if tensor.start != end:
            message = f"has a hole or an overlap at byte {end:,}, before {name}: copy the file again"
            raise ModelError(message, where=str(path))
        end += tensor.nbytes
    return table


def _tensor(file: str, entry: Mapping[str, Any], *, first: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(int(length) for length in entry["shape"])
    if not 0 <= begin <= end or math.prod(shape) * ITEM_BITS[entry["dtype"]] != (end - begin) * 8:
        raise ValueError
    return TensorInfo(file=file, dtype=entry["dtype"], shape=shape, start=first + begin, nbytes=end - begin)


def shard_names(directory: Path) -> tuple[str, ...]:
    """The weight files transformers would read, in its order of preference; none when there are no safetensors."""
    if (directory / WEIGHTS).is_file():
        return (WEIGHTS,)
    return tuple(sorted(set(_weight_map(directory).values())))


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name to file name, from the index of a model in several files; empty without one."""
    index = directory / INDEX
    if not index.is_file():
        return {}
    try:
        weight_map = parsed(index.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or any(Path(file).name != file for file in weight_map.values()):
            raise ValueError
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror}): give your user the right to", where=str(index)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError("is not an index of weight files: copy it again", where=str(index)) from None
    return weight_map


def tensor_table(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of the model. Raises ModelError naming each file that is missing or not whole."""
    shards = shard_names(directory)
    if not shards:
        raise ModelError(_without_safetensors(directory), where=str(directory))
    problems: list[Problem] = []
    table: dict[str, TensorInfo] = {}
    for shard in shards:
        path = directory / shard
        if not path.is_file():
            problems.append(Problem(str(path), "is named in the index and is not there: copy the whole model again"))
            continue
        try:
            table |= tensors_in(path)
        except ModelError as error:
            problems.extend(error.problems)
        except OSError as error:
            problems.append(Problem(str(path), f"cannot be read ({error.strerror}): give your user the right to"))
    if not problems and shards != (WEIGHTS,):
        missing = [name for name in _weight_map(directory) if name not in table]
        if missing:
            message = f"names {len(missing)} tensors that its files lack ({missing[0]}): copy the whole model again"
            problems.append(Problem(str(directory / INDEX), message))
    if problems:
        raise ModelError(problems)
    return table


def _without_safetensors(directory: Path) -> str:
    """Why there is nothing to load, by what lies there instead."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickled = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".ckpt")) and "args" not in name]
    if pickled:
        return (
            f"has its weights in {pickled[0]}, a pickle that can run code when it is read; lorafit reads "
            "safetensors only: take a safetensors revision, or load it and write it with `save_pretrained`"
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"holds {gguf[0]}; a GGUF cannot be trained: name the model it was made from"
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"has {others[0]} but no {WEIGHTS} (or {INDEX}): rename it, or copy the rest"
    return f"has no weights: {WEIGHTS}, or {INDEX} with its files, is missing"


def fingerprint(directory: Path, *, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """Hash that two copies of a base model share, however they are cut into files.

    Covers config.json (without where and by which version it was written), every tensor's name, type and shape, and of
    its bytes 16 blocks of 4 KiB spread evenly (all of them up to 64 KiB). A training run, a merge or a requantisation
    changes far more than it takes to show; a few edited rows of an embedding may fall between the blocks. Reading all
    bytes instead would take minutes for 70 B parameters.
    """
    digest = hashlib.sha256()
    facts = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
        with (directory / tensor.file).open("rb") as file:
            for offset, length in _samples(tensor.nbytes):
                file.seek(tensor.start + offset)
                digest.update(file.read(length))
    return digest.hexdigest()


def _samples(nbytes: int) -> list[tuple[int, int]]:
    """(offset, length) of the blocks that are hashed: the first and the last are the tensor's ends."""
    if nbytes <= SAMPLES_PER_TENSOR * SAMPLE_BYTES:
        return [(0, nbytes)]
    last = nbytes - SAMPLE_BYTES
    return [(last * block // (SAMPLES_PER_TENSOR - 1), SAMPLE_BYTES) for block in range(SAMPLES_PER_TENSOR)]
