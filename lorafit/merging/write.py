"""The weights of the merged model, streamed: what stays is copied as bytes, what changes passes in row blocks."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lorafit.builders.weight_files import INDEX, WEIGHTS, TensorInfo
from lorafit.errors import ModelError
from lorafit.merging.deltas import ScaleColumns
from lorafit.merging.plan import TORCH, MergePlan, OutputShard, OutputTensor, Piece

Progress = Callable[[int], None]
"""Takes the number of bytes written since it was last called."""

BLOCK = 1 << 20
"""Elements of a block; a few MB in float32, so that the steps of a change find it in the processor's cache."""
COPY = 64 << 20
FLUSH = 256 << 20
"""Bytes after which the disk is set to work on them, beside the computing of the next."""
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def write_merged(plan: MergePlan, directory: Path, *, progress: Progress) -> None:
    """Write every shard of `plan`, and the index if there are several, to `directory`; all of it is on disk on return.

    Raises ModelError when a weight does not fit into float16; what the disk says (full, read-only) comes as OSError.
    """
    size = max((_columns(tensor.shape) for shard in plan.shards for tensor in shard.tensors), default=1)
    blocks = _Blocks(max(BLOCK, size))
    with ThreadPoolExecutor(max_workers=1) as flusher:
        for shard in plan.shards:
            _write_shard(shard, plan.base_directory, directory / shard.file, blocks, flusher, progress)
    if [shard.file for shard in plan.shards] != [WEIGHTS]:
        index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(plan.weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def header(tensors: Sequence[OutputTensor]) -> bytes:
    """The head of a safetensors file that holds `tensors` one behind the other."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _write_shard(
    shard: OutputShard, base: Path, path: Path, blocks: _Blocks, flusher: ThreadPoolExecutor, progress: Progress
) -> None:
    head = header(shard.tensors)
    sources: dict[str, int] = {}
    target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    flushed: Future[None] | None = None
    try:
        for tensor in shard.tensors:
            if isinstance(tensor.source, TensorInfo) and tensor.source.file not in sources:
                sources[tensor.source.file] = os.open(base / tensor.source.file, os.O_RDONLY)
        os.pwrite(target, head, 0)
        offset = unflushed = len(head)
        for run in _runs(shard.tensors):
            first = run[0]
            source = sources[first.source.file] if isinstance(first.source, TensorInfo) else -1
            nbytes = sum(tensor.nbytes for tensor in run)
            if isinstance(first.source, TensorInfo) and first.is_copy:
                _copy(source, target, start=first.source.start, offset=offset, nbytes=nbytes, progress=progress)
            else:
                blocks.rewrite(first, source, target, offset=offset, progress=progress)
            offset += nbytes
            if offset - unflushed > FLUSH and (flushed is None or flushed.done()):
                flushed, unflushed = flusher.submit(os.fdatasync, target), offset
        if flushed is not None:
            flushed.result()
        os.fsync(target)
    finally:
        if flushed is not None:
            flushed.exception()  # waits: the file must stay open that long
        for descriptor in (target, *sources.values()):
            os.close(descriptor)


def _runs(tensors: Sequence[OutputTensor]) -> Iterator[list[OutputTensor]]:
    """Tensors that are copied from one stretch of one file together; every other one alone."""
    run: list[OutputTensor] = []
    for tensor in tensors:
        if run and not (_is_next(run[-1], tensor)):
            yield run
            run = []
        run.append(tensor)
    if run:
        yield run


def _is_next(one: OutputTensor, other: OutputTensor) -> bool:
    if not (one.is_copy and other.is_copy):
        return False
    assert isinstance(one.source, TensorInfo) and isinstance(other.source, TensorInfo)
    return one.source.file == other.source.file and one.source.start + one.source.nbytes == other.source.start


def _copy(source: int, target: int, *, start: int, offset: int, nbytes: int, progress: Progress) -> None:
    """Let the kernel copy; where it does not (another file system), read and write."""
    done, in_kernel = 0, True
    while done < nbytes:
        count = min(COPY, nbytes - done)
        if in_kernel:
            try:
                count = os.copy_file_range(source, target, count, start + done, offset + done)
            except OSError as error:
                if error.errno not in NO_KERNEL_COPY:
                    raise
                in_kernel = False
                continue
            if not count:
                in_kernel = False
                continue
        else:
            data = os.pread(source, min(count, 8 << 20), start + done)
            if not data:
                raise ModelError("a weight file of the base became shorter while it was read: merge again")
            count = os.pwrite(target, data, offset + done)
        done += count
        progress(count)


def _columns(shape: Sequence[int]) -> int:
    """Of a tensor taken as rows: the last dimension of experts, 1 of a vector, all but the first otherwise."""
    return shape[-1] if len(shape) == 3 else math.prod(shape[1:])


class _Blocks:
    """The buffers a block passes through; made once, so that memory stays flat however large the model is."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self.work = torch.empty(elements, dtype=torch.float32)
        self.scratch = torch.empty(elements, dtype=torch.float32)
        self.stored = torch.empty(elements * 8, dtype=torch.uint8)

    def rewrite(self, tensor: OutputTensor, source: int, target: int, *, offset: int, progress: Progress) -> None:
        """Write `tensor` at `offset`: each block read, widened to float32, changed, rounded once, written."""
        columns = _columns(tensor.shape)
        rows = math.prod(tensor.shape) // max(columns, 1)
        step = max(1, self.elements // max(columns, 1))
        width = columns * TORCH[tensor.dtype].itemsize
        for piece in tensor.pieces or (Piece(None, None, 0, 0, rows),):
            change = piece.change
            if isinstance(change, ScaleColumns):
                for start, count in _steps(piece.rows, step):
                    block = self._load(tensor.source, source, row=piece.row + start, count=count, columns=columns)
                    change.observe(block, first=piece.first + start, scratch=self._scratch(count, columns))
            for start, count in _steps(piece.rows, step):
                row = piece.row + start
                block = self._load(tensor.source, source, row=row, count=count, columns=columns)
                if change is not None:
                    scratch = self._scratch(count, columns)
                    change.apply(block, expert=piece.expert, first=piece.first + start, scratch=scratch)
                self._store(block, tensor, target, offset=offset + row * width)
                progress(count * width)

    def _scratch(self, count: int, columns: int) -> Tensor:
        return self.scratch[: count * columns].view(count, columns)

    def _load(self, held: TensorInfo | Tensor, source: int, *, row: int, count: int, columns: int) -> Tensor:
        block = self.work[: count * columns].view(count, columns)
        if isinstance(held, Tensor):
            return block.copy_(held.reshape(-1, columns)[row : row + count])
        dtype = TORCH[held.dtype]
        nbytes = count * columns * dtype.itemsize
        into = self.stored[:nbytes] if dtype != torch.float32 else block.view(-1).view(torch.uint8)
        _read(source, into, held.start + row * columns * dtype.itemsize)
        return block if dtype == torch.float32 else block.copy_(into.view(dtype).view(count, columns))

    def _store(self, block: Tensor, tensor: OutputTensor, target: int, *, offset: int) -> None:
        dtype = TORCH[tensor.dtype]
        if dtype != torch.float32:
            stored = self.stored[: block.numel() * dtype.itemsize].view(dtype).view(block.shape)
            block = stored.copy_(block)
            if dtype == torch.float16 and not torch.isfinite(block).all():
                raise ModelError(f"{tensor.name} has values beyond float16's 65,504: use --dtype bfloat16 or float32")
        _write(target, block.view(-1).view(torch.uint8), offset)


def _steps(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of each block."""
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


def _read(source: int, into: Tensor, offset: int) -> None:
    view, done = memoryview(into.numpy()), 0  # type: ignore[arg-type]
    while done < len(view):
        count = os.preadv(source, [view[done:]], offset + done)
        if not count:
            raise ModelError("a weight file of the base became shorter while it was read: merge again")
        done += count


def _write(target: int, data: Tensor, offset: int) -> None:
    view, done = memoryview(data.numpy()), 0  # type: ignore[arg-type]
    while done < len(view):
        done += os.pwrite(target, view[done:], offset + done)
