"""What a plan is made for: GPUs by name (memory, arithmetic, bandwidth), or a CPU; and what `--gpu` may say."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorafit.errors import RecipeError

if TYPE_CHECKING:  # a plan for a named GPU needs no torch
    from lorafit.preflight import Machine
    from lorafit.recipe.sections import LaunchSection

GIB = 2**30
TAKEN = GIB
"""Less than this of a GPU's memory is the driver's own."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or the CPU of this machine."""

    name: str
    memory_bytes: int
    bf16_tflops: float | None = None
    """Dense bfloat16 on tensor cores, float32 sums; None where only the memory is known."""
    fp32_tflops: float | None = None
    """Float32 without tensor cores."""
    bandwidth_gb: float | None = None
    """GB/s of the device memory."""
    has_bf16: bool = True
    is_cpu: bool = False
    process_bytes: int = 0
    """Of a CPU: what Python and the libraries hold besides tensors."""


def _gpu(name: str, gib: float, bf16: float, fp32: float, bandwidth: float, *, has_bf16: bool = True) -> Gpu:
    return Gpu(name, int(gib * GIB), bf16, fp32, bandwidth, has_bf16)


# Memory: what torch.cuda reports in total, which is less than is printed on the box. Rates: NVIDIA's data sheets (T4,
# A10G from its g5 instances, L4, L40S, A6000, A100, H100, H200, B200) and architecture papers (GeForce: tensor rate
# with float32 sums, half of the one with float16 sums), dense, at boost clock.
KNOWN = {
    gpu.name: gpu
    for gpu in (
        _gpu("t4", 14.56, 65, 8.1, 320, has_bf16=False),
        _gpu("rtx3090", 23.69, 71, 35.6, 936),
        _gpu("rtx4090", 23.64, 165, 82.6, 1008),
        _gpu("rtx5090", 31.36, 210, 104.8, 1792),
        _gpu("a10g", 21.99, 70, 31.2, 600),
        _gpu("l4", 21.96, 121, 30.3, 300),
        _gpu("a6000", 47.40, 155, 38.7, 768),
        _gpu("l40s", 44.39, 362, 91.6, 864),
        _gpu("a100-40", 39.39, 312, 19.5, 1555),
        _gpu("a100-80", 79.15, 312, 19.5, 2039),
        _gpu("h100", 79.10, 989, 66.9, 3350),
        _gpu("h200", 139.72, 989, 66.9, 4800),
        _gpu("b200", 178.35, 2250, 75, 8000),
    )
}
_OTHER_NAMES = {"a100": "a100-80", "h100-80": "h100", "rtxa6000": "a6000", "a10": "a10g"}


def gpu_named(text: str) -> Gpu:
    """`rtx4090`, `a100-80`, `NVIDIA H200`, or `24GiB` for any GPU with that much memory. Raises RecipeError."""
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)", text.strip(), re.IGNORECASE):
        units = {"gib": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}
        memory = int(float(size[1]) * units[size[2].lower()])
        if memory:
            return Gpu(text.strip(), memory)
    plain = _plain(text)
    found = {_plain(name): gpu for name, gpu in KNOWN.items()}
    found |= {_plain(other): KNOWN[name] for other, name in _OTHER_NAMES.items()}
    if plain in found:
        return found[plain]
    near = difflib.get_close_matches(plain, found, n=1, cutoff=0.6)
    mend = f"did you mean {found[near[0]].name}?" if near else "write its memory (24GiB)"
    message = f"{text!r} is not known; {mend} Known are {', '.join(KNOWN)}, a size (24GiB), or cpu"
    raise RecipeError(message, where="--gpu")


CONTEXT = 512 * 2**20
"""CUDA context and loaded kernels, assumed: 0.4 to 0.6 GiB."""


def gpu_of_this_machine(machine: Machine, *, free_bytes: int) -> Gpu:
    """With the memory that others leave of it: a desktop and other people's processes are on it, too.

    `free_bytes` as seen by a process whose context is there already, which a plan counts as part of the run.
    """
    gpu = device_of(machine)
    usable = min(gpu.memory_bytes, free_bytes + CONTEXT)
    if gpu.memory_bytes - usable < TAKEN:
        return gpu
    return replace(gpu, name=f"{gpu.name} as it is used now", memory_bytes=usable)


def asked_for(section: LaunchSection, *, gpu: str | None, count: int | None) -> tuple[Gpu, int]:
    """What is planned for and how many of them: what `gpu` names, else what is here; `count`, else as many as the
    recipe says. Raises RecipeError where `gpu` is unknown."""
    asked = count or section.num_processes
    if gpu is not None and gpu.lower() != "cpu":
        return gpu_named(gpu), 1 if asked == "auto" else asked
    from lorafit.preflight import free_gpu_bytes, this_cpu, this_machine  # torch, which a named GPU does without

    machine = this_machine() if gpu is None else this_cpu()
    number = max(1, machine.gpus) if asked == "auto" else asked
    if machine.device != "cuda":
        return device_of(machine), number
    free = free_gpu_bytes(range(min(number, machine.gpus)))
    return gpu_of_this_machine(machine, free_bytes=free), number


def device_of(machine: Machine) -> Gpu:
    """The GPU that the driver names, whole, with the rates of the table where that knows it; else the CPU."""
    if machine.device != "cuda":
        return Gpu(machine.name, machine.memory_bytes, has_bf16=machine.has_bf16, is_cpu=True)
    plain = _plain(machine.name)
    inside = [gpu for known, gpu in KNOWN.items() if _plain(known.split("-")[0]) in plain]
    near = min(inside, key=lambda gpu: abs(gpu.memory_bytes - machine.memory_bytes), default=Gpu("", 0))
    return replace(near, name=machine.name, memory_bytes=machine.memory_bytes, has_bf16=machine.has_bf16)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
