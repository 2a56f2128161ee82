"""This machine's CPU as a device to plan for: how quickly it multiplies and writes, and what a process takes on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from lorafit.operating_system import resident_bytes
from lorafit.planning.gpus import Gpu

WIDTH = 1024
"""Of the square matrices: as large as those of small models, too large for the caches of a core."""
COPIED = 64 << 20
"""Bytes that are read, and written to memory just taken from the system, as the large tensors of a step are: several
times slower than copying to and fro."""
SECONDS = 0.5
"""For each rate."""


def measured(cpu: Gpu) -> Gpu:
    """With its rates, measured with torch's threads, and what a process holds that has imported what a run imports."""
    square = torch.rand(WIDTH, WIDTH)
    flops = 2 * WIDTH**3
    float32 = flops / _seconds(lambda: square @ square)
    half = square.bfloat16()
    bf16 = flops / _seconds(lambda: half @ half) if cpu.has_bf16 else float32
    values = torch.zeros(COPIED // 4)
    bandwidth = 2 * COPIED / _seconds(lambda: values + 1)
    return replace(
        cpu,
        bf16_tflops=bf16 / 1e12,
        fp32_tflops=float32 / 1e12,
        bandwidth_gb=bandwidth / 1e9,
        process_bytes=resident_bytes(),
    )


def shared(cpu: Gpu, count: int) -> Gpu:
    """What each of several processes has of it."""
    assert cpu.bf16_tflops is not None and cpu.fp32_tflops is not None and cpu.bandwidth_gb is not None
    return replace(
        cpu,
        memory_bytes=cpu.memory_bytes // count,
        bf16_tflops=cpu.bf16_tflops / count,
        fp32_tflops=cpu.fp32_tflops / count,
        bandwidth_gb=cpu.bandwidth_gb / count,
    )


def _seconds(work: Callable[[], object]) -> float:
    """The quickest of several, the first left out."""
    work()
    quickest, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        quickest = min(quickest, time.perf_counter() - started)
    return quickest
