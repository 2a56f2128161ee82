"""Which floating types this machine computes itself, and what `auto` comes to where it does not compute bfloat16.

A CPU without AVX512-BF16 or AMX emulates it: 0.6 to 1.2 GFLOP/s on two AVX2 cores, fifty times less than float32.
"""

from __future__ import annotations

import torch


def computes_bfloat16() -> bool:
    """Whether the first GPU, or without one the CPU, computes bfloat16 natively."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_computes_bfloat16()


def cpu_computes_bfloat16() -> bool:
    """What torch will use here, not only what the processor has: ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA narrow it.

    No public query exists: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/cpu/__init__.py. Those ask the
    processor itself; oneDNN, which multiplies the matrices, is asked whether it would.
    """
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    is_used = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return bool(has_units and is_used and torch.backends.mkldnn.is_available() and _onednn_computes_bfloat16())


def _onednn_computes_bfloat16() -> bool:
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def base_dtype(dtype: str) -> str:
    """The type to hold base weights in where the recipe says `dtype`: float32 instead of `auto` where 16-bit types
    would be emulated. A GPU without bfloat16 keeps what was saved: it has no memory to spare."""
    emulates = not torch.cuda.is_available() and not cpu_computes_bfloat16()
    return "float32" if dtype == "auto" and emulates else dtype


def compute_dtype(dtype: str) -> str:
    """The type to unpack 4-bit weights to where the recipe says `dtype`."""
    if dtype != "auto":
        return dtype
    if computes_bfloat16():
        return "bfloat16"
    return "float16" if torch.cuda.is_available() else "float32"
