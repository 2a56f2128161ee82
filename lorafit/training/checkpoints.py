"""Committed checkpoints: a directory gets its name when all of it is on disk, with the hash of every file beside them.

What has another name is no checkpoint: one that is being written, or thrown away, lies in a stage.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.storage import seal
from lorafit.storage.files import write_file
from lorafit.storage.json_text import parsed
from lorafit.storage.seal import Damaged, sealed
from lorafit.storage.stage import discard, make_directory, move, remove_abandoned

SEAL = "checkpoint.json"
"""Written last: the hash and size of each file, and what the run was."""

QUARANTINE = "quarantine"
KEPT_AT_LEAST = 2
"""If the newest should turn out to be damaged, there is one before it."""


@dataclass(frozen=True)
class Checkpoint:
    """One that is as it was committed."""

    path: Path
    step: int
    best_step: int | None
    """The step whose adapter had the lowest held-out loss so far; None where that is not looked for."""
    seconds: float
    """What the run had taken until then, all its sessions together."""
    facts: Mapping[str, Any]
    """What the run was: compared with what it is when it goes on."""


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; the library's name for it."""
    return directory / f"checkpoint-{step}"


def commit(stage: Path, target: Path, *, contents: dict[str, Any]) -> None:
    """Seal what lies in the directory `stage` and give it its name; `contents` is what `Checkpoint` holds.

    Killed anywhere in here it leaves a checkpoint that verifies or none of that name.
    """
    body = contents | {"files": sealed(stage)}
    write_file(stage / SEAL, json.dumps({"checkpoint": body, "sha256": _hash_of(body)}, indent=1) + "\n")
    if _is_sealed(target):
        discard(target)
    elif target.exists():  # somebody else's
        quarantine(target, target.parent.parent / QUARANTINE)
    move(stage, target)


def _hash_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verified(path: Path) -> Checkpoint:
    """The checkpoint in `path`, every file hashed. Raises Damaged."""
    body = _seal(path)
    seal.verified(path, body["files"])
    return Checkpoint(path, body["step"], body["best_step"], body["seconds"], body["facts"])


def _seal(path: Path) -> dict[str, Any]:
    if not (path / SEAL).is_file():
        raise Damaged(f"{SEAL} is missing")
    try:
        outer = parsed((path / SEAL).read_bytes())
        body: dict[str, Any] = outer["checkpoint"]
        whole = outer["sha256"] == _hash_of(body)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise Damaged(f"{SEAL} is not what was committed")
    return body


@dataclass(frozen=True)
class Search:
    """What a run can go on from."""

    newest: Checkpoint | None
    damaged: tuple[tuple[Path, str], ...]
    """Those that were passed over, and why."""


def newest_verified(directory: Path) -> Search:
    """The newest checkpoint in `directory` that is as it was committed, together with the best one that it names."""
    damaged: dict[Path, str] = {}
    for path in reversed(_committed(directory)):
        if path in damaged:
            continue
        try:
            checkpoint = verified(path)
        except Damaged as reason:
            damaged[path] = str(reason)
            continue
        if checkpoint.best_step in (None, checkpoint.step):
            return Search(checkpoint, tuple(damaged.items()))
        best = path_of(directory, checkpoint.best_step)
        try:
            verified(best)
        except Damaged as reason:
            if best.is_dir():
                damaged[best] = str(reason)
            damaged[path] = f"{best.name}, which holds the best adapter until then, is damaged or gone"
            continue
        return Search(checkpoint, tuple(damaged.items()))
    return Search(None, tuple(damaged.items()))


def _committed(directory: Path) -> list[Path]:
    """All of that name, oldest first."""
    found = {path: path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in found.items() if step.isdecimal()), key=lambda path: int(found[path]))


IN_THE_WAY = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.ENOTEMPTY, errno.ESTALE)
"""Why something cannot be removed now, as where another process has it open on a network disk."""


def rotate(directory: Path, *, keep: int) -> dict[Path, str]:
    """Remove all committed ones but the newest `keep` and, for each of these, the best that it names.

    Those that could not be removed, and why: the next call tries again, and a run does not stop for them.
    """
    committed = [path for path in _committed(directory) if _is_sealed(path)]
    kept = committed[-max(keep, KEPT_AT_LEAST) :]
    best = {path_of(directory, step) for path in kept if (step := _best_step(path)) is not None}
    stuck: dict[Path, str] = {}
    for path in committed:
        if path in kept or path in best:
            continue
        try:
            discard(path)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise
            stuck[path] = str(error.strerror)
    return stuck


def remove_committed(directory: Path) -> None:
    """Remove every checkpoint, and the directory if it then is empty."""
    remove_abandoned(directory)
    for path in _committed(directory):
        if _is_sealed(path):
            discard(path)
    with suppress(OSError):
        directory.rmdir()


def _is_sealed(path: Path) -> bool:
    """Committed here once, whether or not it is still whole."""
    return (path / SEAL).is_file()


def _best_step(path: Path) -> int | None:
    try:
        step: int | None = _seal(path)["best_step"]
    except Damaged:  # found out when it is needed; a run that goes well does not stop for it
        return None
    return step


def quarantine(path: Path, room: Path) -> Path:
    """Move what stands in the way elsewhere; nothing is thrown away that someone may want to look at."""
    make_directory(room)
    target, number = room / path.name, 1
    while target.exists():
        number += 1
        target = room / f"{path.name}.{number}"
    move(path, target)
    return target
