"""How long a step takes: each operation as long as its arithmetic or its memory traffic needs, whichever is longer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lorafit.planning.gpus import Gpu

ARITHMETIC = 0.72
"""Share of the tensor cores' peak that a large matrix product reaches, assumed."""
BANDWIDTH = 0.80
"""Share of the memory bandwidth that a large copy reaches, assumed."""
SHORTEST = 2e-6
"""Seconds of the smallest kernel, assumed."""
LAUNCH = 6e-6
"""Seconds between two launches from Python, assumed: many small operations wait for each other."""

aten = torch.ops.aten
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_NO_WORK = ("aten.empty", "aten.new_empty", "aten.detach", "aten.lift", "aten.alias", "aten._local_scalar", "prim.")


@dataclass(frozen=True)
class Work:
    """One operation: floating-point operations, bytes read and written, and whether it multiplies in float32."""

    flops: int
    traffic: int
    in_float32: bool


class WorkObserver(TorchDispatchMode):
    """Counts the operations that launch kernels, by the part of the step that `where` names."""

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.work: dict[str, Counter[Work]] = {}
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if work := _work(func, args, kwargs or {}, out):
            self.work.setdefault(self._where(), Counter())[work] += 1
        return out


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> Work | None:
    name = str(func)
    if func.is_view or name.startswith(_NO_WORK):
        return None
    read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    if not func._schema.is_mutable and written:
        known = {tensor.untyped_storage()._cdata for tensor in read}
        if all(tensor.untyped_storage()._cdata in known for tensor in written):
            return None  # a view by another name
    if not written:  # operations on lists, in place: what they read first is what they write
        written = [leaf for leaf in tree_leaves(args[:1]) if isinstance(leaf, torch.Tensor)]
    flops = _flops(func, args, kwargs, out)
    traffic = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))
    if func is torch.ops.bitsandbytes.gemm_4bit.default:
        rows, columns = args[2]
        traffic += 2 * rows * columns * args[0].element_size()  # the weight unpacked: written, then read
    return Work(flops, traffic, bool(flops) and read[0].dtype == torch.float32)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func in (_ATTENTION, _ATTENTION_BACKWARD):
        is_backward = func is _ATTENTION_BACKWARD
        query, key = args[1:3] if is_backward else args[:2]
        batch, heads, length, width = query.shape
        products = 4 * batch * heads * length * key.shape[2] * width
        has_mask = kwargs.get("attn_mask") is not None
        return int(products * (2.5 if is_backward else 1) * (1 if has_mask else 0.5))
    if func is torch.ops.bitsandbytes.gemm_4bit.default:
        rows, columns = args[2]
        return 2 * (args[0].numel() // args[0].shape[-1]) * rows * columns
    if func is torch.ops.lorafit.addmm_float32.default:
        return 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
    counted = flop_registry.get(func.overloadpacket)
    return int(counted(*args, **kwargs, out_val=out)) if counted else 0


@dataclass(frozen=True)
class Duration:
    """Seconds of some operations."""

    seconds: float
    flops: float
    launches: float
    kernels: float
    """Seconds that the kernels alone take; the launches may take longer."""

    def __add__(self, other: Duration) -> Duration:
        return _duration(self.kernels + other.kernels, self.flops + other.flops, self.launches + other.launches)

    def scaled(self, times: float) -> Duration:
        """As often as `times`."""
        return _duration(self.kernels * times, self.flops * times, self.launches * times)


def duration(work: Counter[Work], gpu: Gpu) -> Duration:
    """Of operations one after another on a GPU whose rates are known."""
    if gpu.bf16_tflops is None or gpu.fp32_tflops is None or gpu.bandwidth_gb is None:
        raise ValueError(f"no rates are known of {gpu.name}")
    # The rates of a CPU are measured, and reached; those of a GPU are printed by its maker.
    arithmetic, share = (1.0, 1.0) if gpu.is_cpu else (ARITHMETIC, BANDWIDTH)
    tensor_cores, cores = gpu.bf16_tflops * 1e12 * arithmetic, gpu.fp32_tflops * 1e12 * arithmetic
    bandwidth = gpu.bandwidth_gb * 1e9 * share
    kernels = sum(
        count * max(one.flops / (cores if one.in_float32 else tensor_cores), one.traffic / bandwidth, SHORTEST)
        for one, count in work.items()
    )
    return _duration(kernels, sum(one.flops * count for one, count in work.items()), sum(work.values()))


def _duration(kernels: float, flops: float, launches: float) -> Duration:
    return Duration(max(kernels, launches * LAUNCH), flops, launches, kernels)
