"""A directory that is known by its files: what each was when it was whole, and whether it still is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorafit.storage.files import sha256_of
from lorafit.storage.stage import flush

Seal = Mapping[str, Any]
"""What a file was: `sha256`, and where they are kept `bytes` and `identity`."""


class Damaged(Exception):
    """What is on disk is not what was sealed; the text says what differs."""


def sealed(directory: Path) -> dict[str, Seal]:
    """Size and SHA-256 of every file below `directory`, by its path there; all of them are on the disk on return."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    seals = _side_by_side(files)
    for path in directory.rglob("*"):
        if path.is_dir():
            flush(path)
    return {path.relative_to(directory).as_posix(): seal for path, seal in zip(files, seals, strict=True)}


def verified(directory: Path, seals: Mapping[str, Seal]) -> None:
    """Every file is what was sealed. Raises Damaged, naming the first that is not.

    One that is sealed with its `identity` and still has it is not read: a second is saved for each gigabyte.
    """
    for name, seal in seals.items():
        file = directory / name
        if not file.is_file():
            raise Damaged(f"{name} is missing")
        size = file.stat().st_size
        if size != seal.get("bytes", size):
            raise Damaged(f"{name} has {size:,} bytes, {seal['bytes']:,} were committed")
        if seal.get("identity") != identity(file) and sha256_of(file) != seal["sha256"]:
            raise Damaged(f"{name} is not what was committed (SHA-256 differs)")


def identity(path: Path) -> list[int]:
    """Changes whenever the file is written to: nobody can set the last of the times back."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _side_by_side(files: Sequence[Path]) -> list[Seal]:
    """One by one where memory has just run out and no thread can be started."""
    try:
        with ThreadPoolExecutor() as threads:
            return list(threads.map(_flushed, files))
    except RuntimeError:
        return [_flushed(file) for file in files]


def _flushed(path: Path) -> Seal:
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
