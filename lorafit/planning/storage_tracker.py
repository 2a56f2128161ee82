"""Bytes of live tensor storage while code runs on fake tensors: what the allocator of a GPU would hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROUND = 512
"""CUDA's caching allocator hands out multiples of this (kMinBlockSize, c10/cuda/CUDACachingAllocator.cpp)."""

Temporary = Callable[..., int]
"""Bytes that one kernel takes for itself while it runs, from its arguments."""


@dataclass
class Moment:
    """The most that was live while one label stood."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


@dataclass
class _Block:
    size: int
    part: str
    number: int


class StorageTracker(TorchDispatchMode):
    """Adds each new storage when an operation makes it, subtracts it when it dies.

    `place(label, part)` says where in the step we are and what is being allocated; `moments` then holds the peak of
    each label with what it was made of. `trace` is every allocation (number, bytes) and release (number, -bytes).
    """

    def __init__(self, temporaries: dict[Any, Temporary] | None = None, *, round_to: int = ROUND) -> None:
        super().__init__()
        self._round_to = round_to
        self.temporaries = temporaries or {}
        self.moments: dict[str, Moment] = {}
        self.trace: list[tuple[int, int]] = []
        self.live = 0
        self.parts: dict[str, int] = {}
        self.operations = 0
        self.paused = 0
        self.label, self._part = "model", "weights"
        self._blocks: dict[int, _Block] = {}
        self._deaths: dict[int, Any] = {}
        self._count = 0

    def place(self, label: str, part: str) -> None:
        """What follows happens at `label` and allocates `part`."""
        self.label, self._part = label, part

    @contextmanager
    def allocating(self, part: str) -> Iterator[None]:
        """What is allocated meanwhile is `part`, wherever in the step that is."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def forget_peaks(self) -> None:
        """Start to look for peaks here."""
        self.moments = {}

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Storages that live from here on."""
        for tensor in tensors:
            self._add(tensor.untyped_storage())

    def name(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Storages that turned out to be another part."""
        for tensor in tensors:
            block = self._blocks.get(tensor.untyped_storage()._cdata)
            if block is not None and block.part != part:
                self.parts[block.part] -= block.size
                self.parts[part] = self.parts.get(part, 0) + block.size
                block.part = part

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = self._rounded(storage.nbytes())
        if key in self._blocks or not size:
            return
        self._count += 1
        # While gradients flow, what is computed with gradients switched on is computed for the second time.
        part = "recomputed" if self._part == "temporary" and torch.is_grad_enabled() else self._part
        self._blocks[key] = _Block(size, part, self._count)
        self._deaths[key] = weakref.ref(storage, lambda _: self._free(key))
        self._change(part, size)
        self.trace.append((self._count, size))
        self._look(0)

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)
        self._deaths.pop(key)
        if block.size:
            self._change(block.part, -block.size)
            self.trace.append((block.number, -block.size))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage that changed its size, as FSDP2's gathered weights do."""
        block = self._blocks.get(storage._cdata)
        size = self._rounded(storage.nbytes())
        if block is None or block.size == size:
            return
        if block.size:
            self.trace.append((block.number, -block.size))
        self._change(block.part, -block.size)
        block.part = "communication buffers"
        self._change(block.part, size)
        block.size = size
        if size:
            self._count += 1
            block.number = self._count
            self.trace.append((block.number, size))
            self._look(0)

    def _rounded(self, size: int) -> int:
        return -(-size // self._round_to) * self._round_to

    def _change(self, part: str, size: int) -> None:
        self.live += size
        self.parts[part] = self.parts.get(part, 0) + size

    def _look(self, temporary: int) -> None:
        moment = self.moments.setdefault(self.label, Moment())
        if self.live + temporary > moment.total:
            moment.total, moment.parts = self.live + temporary, dict(self.parts)
            if temporary:
                moment.parts["temporary"] = moment.parts.get("temporary", 0) + temporary

    def _take_temporarily(self, size: int) -> None:
        size = self._rounded(size)
        self._look(size)
        self._count += 1
        self.trace += [(self._count, size), (self._count, -size)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it calls the operations on its local tensors itself
        out = func(*args, **(kwargs or {}))
        if self.paused or func is torch.ops.prim.device.default or active_fake_mode() is None:
            return out
        self.operations += 1
        self.add(leaf for leaf in tree_iter(out) if isinstance(leaf, torch.Tensor))
        if func in self.temporaries and (size := self.temporaries[func](*args, **(kwargs or {}))):
            self._take_temporarily(size)
        return out
