"""Checkpoints of the first process, where those on other machines can read them, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object

from lorafit.launching import launch
from lorafit.storage.stage import scratch
from lorafit.training.checkpoints import SEAL
from lorafit.training.processes import by_first

CHUNK_BYTES = 64 * 2**20


@contextmanager
def seen_here(checkpoint: Path) -> Iterator[Path]:
    """A checkpoint that lies on the first process's disk: itself where this machine sees that disk, else a copy for as
    long as the block runs. Every process takes part."""
    if PartialState().num_processes == 1:
        yield checkpoint
        return
    seal = by_first(lambda: _content(checkpoint / SEAL))
    is_here = _content(checkpoint / SEAL) == seal
    seen = gather_object([(launch.machine_rank(), is_here)])
    blind = {machine for machine, sees in seen if not sees}
    if not blind:
        yield checkpoint
        return
    is_copied = launch.machine_rank() in blind
    writes = is_copied and PartialState().is_local_main_process
    with scratch() as directory:
        _send(checkpoint, directory if writes else None)
        made = dict(gather_object([(launch.machine_rank(), str(directory)) if writes else (-1, "")]))
        yield Path(made[launch.machine_rank()]) if is_copied else checkpoint
        PartialState().wait_for_everyone()


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _send(checkpoint: Path, into: Path | None) -> None:
    """Every file of the first process's `checkpoint`, into a directory of who wants it."""
    names = by_first(
        lambda: [
            (path.relative_to(checkpoint).as_posix(), path.stat().st_size)
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file()
        ]
    )
    state = PartialState()
    for name, size in names:
        if into is not None:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).touch()
        for start in range(0, size, CHUNK_BYTES):
            count = min(CHUNK_BYTES, size - start)
            chunk = torch.zeros(count, dtype=torch.uint8, device=state.device)
            if state.is_main_process:
                with (checkpoint / name).open("rb") as file:
                    file.seek(start)
                    chunk = torch.frombuffer(bytearray(file.read(count)), dtype=torch.uint8).to(state.device)
            chunk = broadcast(chunk)
            if into is not None:
                with (into / name).open("ab") as file:
                    file.write(chunk.cpu().numpy().tobytes())
