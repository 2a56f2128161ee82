"""What `lorafit plan` answers; no torch, so that the command line can hold it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorafit.planning.gpus import CONTEXT, Gpu

Verdict = Literal["fits", "tight", "does not fit"]
PARTS = (
    *("weights", "quantization state", "adapter", "gradients", "optimizer", "activations", "recomputed", "loss head"),
    *("temporary", "communication buffers", "reserve"),
)
"""In the order they are shown. `activations` are those kept for the backward pass, `recomputed` those that
checkpointing computes again, `temporary` what one operation needs while it runs, `reserve` what lies around all that:
the allocator's rounding, cuBLAS, the CUDA context, NCCL."""

WORKSPACES = 2 * 8_519_680
"""Two cuBLAS workspaces, as measured on an A100."""
NCCL = 512 * 2**20
"""Buffers of NCCL where several GPUs train, assumed."""
MARGIN = 0.05
"""The prediction is claimed to this; what is nearer to the limit is tight."""


def surroundings(gpu: Gpu, count: int) -> int:
    """Bytes on a GPU outside the caching allocator; of a process on a CPU besides its tensors."""
    if gpu.is_cpu:
        return gpu.process_bytes
    return WORKSPACES + CONTEXT + (NCCL if count > 1 else 0)


def verdict(allocated: int, reserved: int, *, gpu: Gpu, count: int) -> Verdict:
    """`tight`: within 5 % of the limit, or above it only by cached blocks, which the allocator gives back first."""
    around = surroundings(gpu, count)
    if allocated + around > gpu.memory_bytes:
        return "does not fit"
    return "fits" if (reserved + around) * (1 + MARGIN) <= gpu.memory_bytes else "tight"


@dataclass(frozen=True)
class Speed:
    """How fast a run is, on one GPU times their number."""

    tokens_per_second: float
    pass_seconds: float
    """One forward and backward pass of the longest batch."""
    update_seconds: float
    """Clipping and optimizer."""
    model_flops_utilization: float
    """Share of the peak that the counted operations reach."""
    arithmetic: tuple[str, ...]


@dataclass(frozen=True)
class Measurement:
    """What was allocated at the peak, and on a GPU what was reserved."""

    allocated: int
    reserved: int | None
    seconds: float | None
    """Of the last step."""


@dataclass(frozen=True)
class RowsOfRun:
    """The training rows, and how many tokens they have."""

    rows: int
    """Of one epoch."""
    tokens_per_row: float | None
    """None where no tokenizer is at hand, as of `batch_length`."""
    batch_length: float | None
    """Tokens that the rows of a batch are padded to, in the mean; without `training.packing`."""
    counted_on: int
    """Rows that the tokens were counted on."""


@dataclass(frozen=True)
class Disk:
    """Bytes that the run needs on disk."""

    base_bytes: int
    """The base model's weights, as downloaded."""
    adapter_bytes: int
    checkpoint_bytes: int
    """One checkpoint: adapter and optimizer."""
    checkpoints: int
    """How many there are at once."""

    @property
    def run_bytes(self) -> int:
        """Of the run directory."""
        return self.adapter_bytes + self.checkpoints * self.checkpoint_bytes


@dataclass(frozen=True)
class Advice:
    """One change of the recipe and what comes of it, planned anew."""

    what: str
    change: dict[str, Any]
    """Keys of the recipe and their new values."""
    allocated_bytes: int
    saving_bytes: int
    verdict: Verdict
    tokens_per_second: float | None


@dataclass(frozen=True)
class Largest:
    """The largest value of one key that fits, all others as they are."""

    key: str
    value: int | None
    """None when not even the smallest fits."""


@dataclass(frozen=True)
class Fixed:
    """A recipe that fits, or the smallest that was found."""

    change: dict[str, Any]
    verdict: Verdict
    fits: bool
    line: str
    """What it takes."""


@dataclass(frozen=True)
class Plan:
    """What one recipe takes; the JSON of `lorafit plan`."""

    gpu: str
    """Its name; that of the processor where a CPU is planned."""
    is_cpu: bool
    memory_bytes: int
    count: int
    strategy: str
    batch: str
    """The batch that is planned: the longest the recipe allows."""
    gradient_checkpointing: bool
    checkpointing_reason: str
    allocated_bytes: int
    """The promise: what `torch.cuda.max_memory_allocated` shows."""
    reserved_bytes: int
    """What the caching allocator takes for it."""
    device_bytes: int
    """Reserved, and what CUDA, cuBLAS and NCCL take besides."""
    parts: dict[str, int]
    peak_at: str
    verdict: Verdict
    fits: bool
    speed: Speed | None
    tokens_per_second: float | None
    steps: int | None
    rows: RowsOfRun | None
    """What the run reads; None where `training.max_steps` alone says how long it is, or the rows are not at hand."""
    seconds: float | None
    """Of training, at most: every batch as long as it may be. None where the number of steps is not known."""
    seconds_expected: float | None
    """The same with batches as long as the rows are in the mean; None where their tokens are not known."""
    disk: Disk
    advice: tuple[Advice, ...]
    largest: tuple[Largest, ...]
    fixed: Fixed | None
    measured_bytes: int | None
    """What a real step allocated, where one was run."""
    measured_seconds: float | None
    """What it took."""
    notes: tuple[str, ...]
    """What is not modelled, and makes the figures an upper bound."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def line(self) -> str:
        """The plan in one line."""
        gpu = Gpu(self.gpu, self.memory_bytes)
        return line(self.verdict, self.allocated_bytes, self.device_bytes, gpu=gpu, speed=self.tokens_per_second)


def line(verdict: Verdict, allocated: int, device: int, *, gpu: Gpu, speed: float | None) -> str:
    """`fits on a100-80: 16.59 GiB allocated, 17.48 GiB of 79.15 GiB in all, 9,500 tokens/s`."""
    tokens = f", {speed:,.0f} tokens/s" if speed else ""
    return (
        f"{verdict} on {gpu.name}: {gib(allocated)} allocated, {gib(device)} of {gib(gpu.memory_bytes)} in all{tokens}"
    )


def gib(size: float) -> str:
    """`16.59 GiB`."""
    return f"{size / 2**30:.2f} GiB"
