"""lorafit's own small sections: how the run is optimised, watched, saved and launched."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lorafit.recipe.sections.base import Section


class OptimizerSection(Section):
    """Beyond `training.optim`."""

    loraplus_lr_ratio: float | None = Field(default=None, ge=1)
    """LoRA+ (arXiv 2402.12354): B learns this many times faster than A; 16 is the paper's. null means the same rate."""


class EarlyStoppingSection(Section):
    """Stop when the held-out loss no longer falls; the best adapter is kept."""

    patience: int = Field(default=3, ge=1)
    """Evaluations in a row without improvement before training stops."""

    min_delta: float = Field(default=0.0, ge=0)
    """Nats by which the loss must fall to count as an improvement."""


def _is_interval(text: str) -> str:
    if not re.fullmatch(r"(?!0+(\.0+)?%)(100|[1-9]?\d(\.\d+)?)%|[1-9]\d*(s|min|h)", text):
        raise ValueError("a share of the run (10%), a number of steps (200) or a time (30s, 10min, 2h)")
    return text


class CheckpointsSection(Section):
    """When checkpoints are written and how many stay."""

    every: Annotated[int, Field(ge=1)] | Annotated[str, AfterValidator(_is_interval)] = "10%"
    """A share of the run (`10%`), a number of steps (`200`), or a time (`30s`, `10min`, `2h`). A share also means at
    least every ten minutes. What a killed run loses is the time since the last; saving takes seconds."""

    keep: int = Field(default=2, ge=2)
    """Newest checkpoints kept; the best is kept besides when the best adapter is wanted. At least 2: should the newest
    be damaged, `train --resume` goes on from the one before. Each takes three times the adapter's bytes."""


class MergeSection(Section):
    """What `lorafit merge` does with the run where its command line does not say."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type of the merged weights. null keeps the base's own. The 16-bit types lose part of a small update, which the
    merge reports; float32 keeps all of it in twice the space."""

    base: Literal["original", "dequantized", "auto"] = "auto"
    """With `quantization`: merge into the 16-bit `original`, or into the `dequantized` weights that training saw;
    `auto` measures both against the quantised model on held-out rows and takes the nearer. Never 4-bit. Without
    `quantization` there is only the original."""

    verify: bool = True
    """Read the merged model back from disk and compare it with base + adapter. Needs 4 bytes of memory a parameter."""


class LaunchSection(Section):
    """How many processes train, and how they share the work."""

    num_processes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes on each machine, one per GPU. `auto`: every GPU of the machine, one process without GPUs."""

    machines: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Machines that train together, each started with the same command. `auto`: as many as SLURM or a Kubernetes job
    say in their variables, else one."""

    shared_disk: bool = False
    """Say that all machines see the output directory, which is then checked before anything is read. false asks nothing
    of the disks: the first machine writes, and sends the others what they need of a checkpoint. ZeRO needs true."""

    strategy: str = Field(default="ddp", min_length=1)
    """`ddp`, `fsdp2`, `zero2`, `zero3`, or the path of an accelerate config file."""
