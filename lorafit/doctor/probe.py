"""Questions that only torch and the Hub can answer, in a process of their own.

A driver that hangs, or a library that crashes, ends that process and not the doctor.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from lorafit.imports import quick_imports

Answer = dict[str, Any]


def torch_import() -> Answer:
    """Version and what it was built for, as plain values: whoever asks imports no torch."""
    with quick_imports():
        torch = importlib.import_module("torch")
    return {"version": str(torch.__version__), "cuda": torch.version.cuda, "hip": torch.version.hip}


def gpus() -> Answer:
    """The devices, each after a product of two matrices on it."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return {"devices": [], "reason": _why_no_cuda(torch)}
    devices = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        total = float((ones @ ones).sum())
        devices.append({"name": about.name, "memory_bytes": about.total_memory, "computes": total == 64.0**3})
    return {"devices": devices, "bf16": torch.cuda.is_bf16_supported(including_emulation=False)}


def _why_no_cuda(torch: Any) -> str:
    if torch.version.cuda is None:
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return ""


def cpu() -> Answer:
    """Cores, and whether bfloat16 is computed natively."""
    torch = importlib.import_module("torch")
    precision = importlib.import_module("lorafit.precision")
    return {"bf16": precision.cpu_computes_bfloat16(), "threads": torch.get_num_threads()}


def bitsandbytes() -> Answer:
    """Ones to 4 bits and back, on the device that trains."""
    torch = importlib.import_module("torch")
    with quick_imports():
        functional = importlib.import_module("bitsandbytes.functional")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ones = torch.ones(64, 64, device=device)
    packed, state = functional.quantize_4bit(ones, quant_type="nf4")
    off = float((functional.dequantize_4bit(packed, state) - ones).abs().max())
    return {"device": device, "off": off}


def hub() -> Answer:
    """Whose token it is."""
    api, errors = (importlib.import_module(f"huggingface_hub.{part}") for part in ("hf_api", "errors"))
    try:
        return {"name": api.HfApi().whoami()["name"]}
    except errors.HfHubHTTPError as error:
        return {"status": error.response.status_code if error.response is not None else None}


STAGES: dict[str, tuple[Callable[[], Answer], ...]] = {"torch": (torch_import, gpus, cpu, bitsandbytes), "hub": (hub,)}


def ask(about: str) -> Iterator[dict[str, Any]]:
    """The name of each stage before it begins, and what came of it after; what one raises is its answer."""
    for stage in STAGES[about]:
        yield {"stage": stage.__name__, "begins": True}
        started = time.monotonic()
        try:
            answer = stage()
        except Exception as error:  # whatever a broken library raises is what is asked for
            answer = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        yield {"stage": stage.__name__, "seconds": round(time.monotonic() - started, 2)} | answer
