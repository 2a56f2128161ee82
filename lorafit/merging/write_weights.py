"""The weights of the merged model, streamed: what stays is copied as bytes, what changes passes in row blocks."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lorafit.builders.weight_files import INDEX, WEIGHTS, TensorInfo
from lorafit.errors import ModelError
from lorafit.merging.deltas import ScaleColumns
from lorafit.merging.merge_plan import TORCH, MergePlan, OutputShard, OutputTensor, Piece
from lorafit.operating_system import flush, flush_data, kernel_copy, read_into

Progress = Callable[[int], None]
"""Takes the number of bytes written since it was last called."""

BLOCK = 1 << 18
"""Elements of a block: 1 MiB in float32, so that the steps of a change find it in a core's own cache."""
TASK = 16 << 20
"""Bytes that one thread takes on at a time."""
FLUSH = 256 << 20
"""Bytes after which the disk is set to work on them, beside the computing of the next."""
THREADS = 4


def write_merged(plan: MergePlan, directory: Path, *, progress: Progress) -> None:
    """Write every shard of `plan`, and the index if there are several, to `directory`; all of it is on disk on return.

    Raises ModelError when a weight does not fit into float16; what the disk says (full, read-only) comes as OSError.
    """
    columns = max((_columns(tensor.shape) for shard in plan.shards for tensor in shard.tensors), default=1)
    # A thread works on blocks of its own, on one core: cores that share a block this small wait more than they work.
    threads = torch.get_num_threads()
    buffers = threading.local()

    def prepare() -> None:
        torch.set_num_threads(1)
        buffers.blocks = _Blocks(max(BLOCK, columns))

    workers = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), initializer=prepare)
    try:
        for shard in plan.shards:
            _write_shard(shard, plan.base_directory, directory / shard.file, workers, buffers, progress)
    finally:
        workers.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
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
    shard: OutputShard,
    base: Path,
    path: Path,
    workers: ThreadPoolExecutor,
    buffers: threading.local,
    progress: Progress,
) -> None:
    with ExitStack() as files:

        def opened(name: Path, flags: int) -> int:
            descriptor = os.open(name, flags, 0o666)
            files.callback(os.close, descriptor)
            return descriptor

        target = opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        names = {tensor.source.file for tensor in shard.tensors if isinstance(tensor.source, TensorInfo)}
        sources = {name: opened(base / name, os.O_RDONLY) for name in sorted(names)}
        tasks: list[Future[int]] = []
        flusher = files.enter_context(ThreadPoolExecutor(max_workers=1))
        files.callback(lambda: wait([task for task in tasks if not task.cancel()]))
        head = header(shard.tensors)
        _write(target, memoryview(head), 0)
        offset = len(head)
        for run in _runs(shard.tensors):
            first, nbytes = run[0], sum(tensor.nbytes for tensor in run)
            source = sources[first.source.file] if isinstance(first.source, TensorInfo) else -1
            if isinstance(first.source, TensorInfo) and first.is_copy:
                for start in range(0, nbytes, TASK):
                    span = (first.source.start + start, offset + start, min(TASK, nbytes - start))
                    tasks.append(workers.submit(_copy, source, target, span))
            else:
                for piece in _tasks(first):
                    tasks.append(workers.submit(_rewrite, buffers, first, piece, source, target, offset))
            offset += nbytes
        unflushed, flushes = 0, []
        for task in tasks:
            progress(task.result())
            unflushed += task.result()
            if unflushed > FLUSH:
                flushes.append(flusher.submit(flush_data, target))
                unflushed = 0
        for flushed in flushes:
            flushed.result()  # the kernel tells of a failed write once: the sync below would not hear of it again
        flush(target)


def _tasks(tensor: OutputTensor) -> Iterator[Piece]:
    """The pieces of a tensor, cut into what one thread takes on at a time."""
    columns = max(_columns(tensor.shape), 1)
    rows = math.prod(tensor.shape) // columns
    step = max(1, TASK // (columns * 4))
    for piece in tensor.pieces or (Piece(None, None, 0, 0, rows),):
        if isinstance(piece.change, ScaleColumns):  # looks at all rows before it changes one
            yield piece
            continue
        for start in range(0, piece.rows, step):
            rows = min(step, piece.rows - start)
            yield replace(piece, first=piece.first + start, row=piece.row + start, rows=rows)


def _rewrite(
    buffers: threading.local, tensor: OutputTensor, piece: Piece, source: int, target: int, offset: int
) -> int:
    blocks: _Blocks = buffers.blocks
    return blocks.rewrite(tensor, piece, source=source, target=target, offset=offset)


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


def _copy(source: int, target: int, span: tuple[int, int, int]) -> int:
    """Let the kernel copy; where it does not (another file system), read and write."""
    start, offset, nbytes = span
    done, in_kernel = 0, True
    while done < nbytes:
        if in_kernel:
            count = kernel_copy(source, target, nbytes - done, start=start + done, offset=offset + done)
            in_kernel = count > 0
        else:
            data = os.pread(source, min(nbytes - done, 4 << 20), start + done)
            if not data:
                raise ModelError("a weight file of the base became shorter while it was read: merge again")
            count = os.pwrite(target, data, offset + done)
        done += count
    return nbytes


def _columns(shape: Sequence[int]) -> int:
    """Of a tensor taken as rows: the last dimension of experts, 1 of a vector, all but the first otherwise."""
    return shape[-1] if len(shape) == 3 else math.prod(shape[1:])


class _Blocks:
    """The buffers a block passes through; made once, so that memory stays flat however large the model is."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self.work = torch.empty(elements, dtype=torch.float32)
        self.scratch = torch.empty(elements, dtype=torch.float32)
        self.stored = torch.empty(elements * 8, dtype=torch.uint8)  # F64 is the widest

    def rewrite(self, tensor: OutputTensor, piece: Piece, *, source: int, target: int, offset: int) -> int:
        """Write one piece of `tensor`, which begins at `offset`: each block is read, widened to float32, changed,
        rounded once, and written. Gives the bytes written."""
        columns = max(_columns(tensor.shape), 1)
        step = max(1, self.elements // columns)
        steps = [(start, min(step, piece.rows - start)) for start in range(0, piece.rows, step)]
        width, change = columns * TORCH[tensor.dtype].itemsize, piece.change
        if isinstance(change, ScaleColumns):
            change.squares.zero_()
            for start, count in steps:
                block = self._load(tensor.source, source, row=piece.row + start, count=count, columns=columns)
                change.observe(block, first=piece.first + start, scratch=self._scratch(count, columns))
        for start, count in steps:
            row = piece.row + start
            block = self._load(tensor.source, source, row=row, count=count, columns=columns)
            if change is not None:
                scratch = self._scratch(count, columns)
                change.apply(block, expert=piece.expert, first=piece.first + start, scratch=scratch)
            self._store(block, tensor, target, offset=offset + row * width)
        return piece.rows * width

    def _scratch(self, count: int, columns: int) -> Tensor:
        return self.scratch[: count * columns].view(count, columns)

    def _load(self, held: TensorInfo | Tensor, source: int, *, row: int, count: int, columns: int) -> Tensor:
        block = self.work[: count * columns].view(count, columns)
        if isinstance(held, Tensor):
            return block.copy_(held.reshape(-1, columns)[row : row + count])
        dtype = TORCH[held.dtype]
        if (there := max(0, min(count, math.prod(held.shape) // columns - row))) < count:
            # Rows of new tokens: the change fills them in.
            block[there:] = 0
            self._load(held, source, row=row, count=there, columns=columns)
            return block
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
        _write(target, _bytes_of(block.view(-1).view(torch.uint8)), offset)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a uint8 tensor."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


def _read(source: int, into: Tensor, offset: int) -> None:
    view, done = _bytes_of(into), 0
    while done < len(view):
        count = read_into(source, view[done:], offset + done)
        if not count:
            raise ModelError("a weight file of the base became shorter while it was read: merge again")
        done += count


def _write(target: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(target, view[done:], offset + done)
