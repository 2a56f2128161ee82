"""What this machine offers, and what it cannot do. Reads the machine and the environment; prints nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from transformers.utils import is_torch_tf32_available

from lorafit.errors import MachineError, Problem
from lorafit.launching.launch import is_worker
from lorafit.operating_system import memory_bytes, processor_name
from lorafit.packages import COMPILER_MEND, missing_compiler, missing_packages
from lorafit.precision import computes_bfloat16, cpu_computes_bfloat16
from lorafit.recipe.load import LoadedRecipe
from lorafit.recipe.paths import STRATEGIES
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.sections import TrainingSection

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value lorafit chose by itself, with the reason it is printed with."""

    value: T
    reason: str


@dataclass(frozen=True)
class Machine:
    """The devices this process may use."""

    device: str
    """`cuda` or `cpu`."""

    name: str
    gpus: int
    has_bf16: bool
    """Whether bfloat16 is computed natively."""

    memory_bytes: int
    """Memory of one device."""


def this_machine() -> Machine:
    """The GPUs of this machine, or its CPU."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Machine(
            device="cuda",
            name=properties.name,
            gpus=torch.cuda.device_count(),
            has_bf16=computes_bfloat16(),
            memory_bytes=properties.total_memory,
        )
    return this_cpu()


def this_cpu() -> Machine:
    """The CPU of this machine, whatever else it has."""
    has_bf16 = cpu_computes_bfloat16()
    return Machine(device="cpu", name=processor_name(), gpus=0, has_bf16=has_bf16, memory_bytes=memory_bytes())


def free_gpu_bytes(gpus: Iterable[int]) -> int:
    """What the fullest of these GPUs has left for this process, what it holds already included.

    Asking makes a CUDA context on each of them: for the processes that use them, and such as end soon.
    """
    return min(torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) for gpu in gpus)


def bf16_choice(training: TrainingSection, machine: Machine) -> Choice[bool]:
    """Whether the step runs under bfloat16 autocast."""
    if training.bf16 != "auto":
        is_emulated = training.bf16 and machine.device == "cpu" and not machine.has_bf16
        return Choice(training.bf16, _emulated("training.bf16", machine) if is_emulated else "training.bf16")
    if training.fp16:
        return Choice(False, "training.fp16 is on")
    if machine.has_bf16:
        return Choice(True, f"{machine.name} computes it natively")
    return Choice(False, f"{machine.name} does not compute it natively")


def dtype_choice(recipe: Recipe, machine: Machine) -> Choice[str] | None:
    """The type of the base's weights; None where it is simply as the recipe says."""
    written = recipe.model.dtype
    if machine.has_bf16 or written == "float32":
        return None
    emulated = f"{machine.name} does not compute bfloat16 natively"
    if machine.device == "cuda":
        mend = "write training.fp16: true and model.dtype: float16" if written != "float16" else ""
        return Choice(written, f"{emulated}; {mend}") if mend else None
    if written == "auto":
        return Choice("float32", emulated)
    return Choice(written, _emulated("model.dtype", machine))


def product_choice(recipe: Recipe, machine: Machine) -> Choice[str] | None:
    """The type that 4-bit weights are unpacked to, where the recipe says one that this CPU emulates."""
    section = recipe.quantization
    if section is None or not section.load_in_4bit or machine.has_bf16 or machine.device != "cpu":
        return None
    written = section.bnb_4bit_compute_dtype
    is_emulated = written in ("bfloat16", "float16")
    return Choice(written, _emulated("quantization.bnb_4bit_compute_dtype", machine)) if is_emulated else None


def _emulated(key: str, machine: Machine) -> str:
    return f"{key}; {machine.name} emulates it, many times slower than float32: write auto"


def checkpointing_choice(
    training: TrainingSection, machine: Machine, *, planned: Choice[bool] | None = None
) -> Choice[bool]:
    """Whether activations are recomputed in the backward pass; what was `planned` for a GPU, where something was."""
    if training.gradient_checkpointing != "auto":
        return Choice(training.gradient_checkpointing, "training.gradient_checkpointing")
    if machine.device == "cpu":
        return Choice(False, "on CPU memory is rarely what runs out, and it costs about 1.45 times the FLOPs")
    if planned is not None:
        return planned
    return Choice(True, "saves most activation memory; set it to false if the run fits without")


def refuse_what_this_machine_lacks(loaded: LoadedRecipe, machine: Machine) -> None:
    """Everything the recipe asks for that this machine does not have. Raises MachineError with all of it."""
    here = tuple(_missing_here(loaded, machine))
    named = {problem.where for problem in here}  # ZeRO without a GPU needs no deepspeed, but another strategy
    problems = (*here, *(problem for problem in missing_packages(loaded) if problem.where not in named))
    if problems:
        raise MachineError(problems)


def _missing_here(loaded: LoadedRecipe, machine: Machine) -> Iterable[Problem]:
    recipe = loaded.recipe
    wanted, strategy = recipe.launch.num_processes, recipe.launch.strategy
    if machine.device == "cuda" and (lack := missing_compiler()):
        yield Problem("this machine", f"{lack}: {COMPILER_MEND}")
    is_here = not is_worker() and strategy in STRATEGIES  # else some of the processes may be on other machines
    if machine.gpus and isinstance(wanted, int) and wanted > machine.gpus and is_here:
        message = f"{wanted} processes, but this machine has {machine.gpus} GPUs; write auto, or at most {machine.gpus}"
        yield loaded.problem("launch.num_processes", message)
    if strategy in ("fsdp2", "zero2", "zero3") and not machine.gpus:
        yield loaded.problem("launch.strategy", f"{strategy} splits the model over GPUs, there is none; write ddp")
    if recipe.training.fp16 and machine.device == "cpu":
        yield loaded.problem("training.fp16", "needs a GPU; leave it out and let bf16 be auto")
    if recipe.training.extra.get("tf32") and not is_torch_tf32_available():
        message = f"{machine.name} does not have it, an NVIDIA GPU from Ampere on does; leave it out"
        yield loaded.problem("training.extra.tf32", message)
    if recipe.training.optim.startswith("paged_") and machine.device == "cpu":
        yield loaded.problem(
            "training.optim", f"{recipe.training.optim} pages GPU memory; on CPU use adamw_torch_fused"
        )
    if recipe.lora.init_lora_weights == "loftq" and machine.device == "cpu":
        yield loaded.problem("lora.init_lora_weights", "loftq needs a GPU: peft fits its factors with CUDA code")
