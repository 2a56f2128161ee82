"""`lorafit plan` for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorafit.planning.plan_result import PARTS, Plan, gib
from lorafit.planning.recipe_changes import written_as

if TYPE_CHECKING:
    from lorafit.planning.plan_result import Advice


CLAIM_ON_CPU = "a guide to a factor of two (--measure times a real step)"
"""Steps of Llamas of 26 M and 90 M parameters took 0.55 to 1.05 times what was planned (CPU time of one thread)."""


def plan_text(plan: Plan) -> str:
    """The peak by part, the three totals, speed, disk, what to change, and the verdict last."""
    parts = (_memory, _time, _length, _disk, _notes, _largest, _advice)
    return "\n".join([*(line for part in parts for line in part(plan)), "", plan.line()])


def _memory(plan: Plan) -> Iterator[str]:
    if plan.is_cpu:
        where = f"memory of {f'each of {plan.count} processes' if plan.count > 1 else 'a process'} on {plan.gpu}"
    else:
        where = f"memory of {f'{plan.count} GPUs, each' if plan.count > 1 else 'one GPU'} {plan.gpu}"
    yield f"{where}, {plan.batch}; the peak is at {plan.peak_at}"
    yield from (f"  {part:<22} {gib(plan.parts[part]):>12}" for part in PARTS if plan.parts.get(part))
    if plan.is_cpu:
        yield f"  {'allocated':<22} {gib(plan.allocated_bytes):>12}   tensors"
        has = f"it has {gib(plan.memory_bytes)}"
        yield f"  {'process':<22} {gib(plan.device_bytes):>12}   with Python and the libraries as measured here; {has}"
    else:
        allocator = "what the allocator takes for it, in expandable segments"
        around = f"with CUDA, cuBLAS and NCCL; it has {gib(plan.memory_bytes)}"
        yield f"  {'allocated':<22} {gib(plan.allocated_bytes):>12}   what torch.cuda.max_memory_allocated shows"
        yield f"  {'reserved':<22} {gib(plan.reserved_bytes):>12}   {allocator}"
        yield f"  {'device':<22} {gib(plan.device_bytes):>12}   {around}"
    if plan.measured_bytes is not None:
        off = plan.allocated_bytes / plan.measured_bytes - 1
        measured = gib(plan.measured_bytes)
        yield f"  {'measured':<22} {measured:>12}   allocated by a real step; the plan is off by {off:+.1%}"
    state = "on" if plan.gradient_checkpointing else "off"
    yield f"  gradient checkpointing {state}: {plan.checkpointing_reason}"


def _time(plan: Plan) -> Iterator[str]:
    yield ""
    if plan.speed is None:
        yield f"speed: not known, only the memory of {plan.gpu} is; name a GPU (--gpu rtx4090)"
        return
    claim = CLAIM_ON_CPU if plan.is_cpu else "claimed to 20 % on one GPU"
    yield f"speed: {plan.speed.tokens_per_second:,.0f} tokens/s, {claim}"
    yield from (f"  {line}" for line in plan.speed.arithmetic)
    if plan.measured_seconds is not None:
        yield f"  measured: {plan.measured_seconds:.4g} s for a real step of at most two passes"


def _length(plan: Plan) -> Iterator[str]:
    """Steps and time of the whole run, with the rows they come from."""
    yield ""
    rows = plan.rows
    if rows is not None:
        tokens = "their tokens are not known: no tokenizer is at hand"
        if rows.tokens_per_row is not None:
            tokens = f"{rows.tokens_per_row:,.0f} tokens each in the mean of {rows.counted_on:,}"
        yield f"run: {rows.rows:,} rows an epoch, {tokens}"
    if plan.steps is None:
        why = "with training.packing it takes the tokenizer" if rows else "the rows are not at hand to be counted"
        yield f"{'  ' if rows else 'run: '}steps and time are not known: {why}"
        return
    lead = "  " if rows else "run: "
    if plan.seconds is None:
        yield f"{lead}{plan.steps:,} steps; how long one takes is not known"
    elif plan.seconds_expected is not None and rows is not None and rows.batch_length is not None:
        yield (
            f"{lead}{plan.steps:,} steps take about {_duration(plan.seconds_expected)} with batches of "
            f"{rows.batch_length:,.0f} tokens, at most {_duration(plan.seconds)} if all were as long as they may be"
        )
    elif rows is not None:
        yield f"{lead}{plan.steps:,} steps of packed rows take about {_duration(plan.seconds)}"
    else:
        yield f"{lead}{plan.steps:,} steps take at most {_duration(plan.seconds)}: every batch as long as it may be"


def _disk(plan: Plan) -> Iterator[str]:
    disk = plan.disk
    yield ""
    yield (
        f"disk: {gib(disk.base_bytes)} for the base model; {gib(disk.run_bytes)} for the run: adapter "
        f"{gib(disk.adapter_bytes)} + {disk.checkpoints} checkpoints x {gib(disk.checkpoint_bytes)}"
    )


def _notes(plan: Plan) -> Iterator[str]:
    yield from (f"note: {note}" for note in plan.notes)


def _largest(plan: Plan) -> Iterator[str]:
    if plan.largest:
        yield ""
        yield "largest that fits, each alone:"
    for one in plan.largest:
        yield f"  {one.key}: {'none' if one.value is None else f'{one.value:,}'}"


def _advice(plan: Plan) -> Iterator[str]:
    if not plan.advice:
        return
    yield ""
    yield "what to change, each alone:"
    width = max(len(one.what) for one in plan.advice)
    yield from (_advice_line(one, width) for one in plan.advice)


def _advice_line(one: Advice, width: int) -> str:
    speed = "" if one.tokens_per_second is None else f"  {one.tokens_per_second:>9,.0f} tokens/s"
    figures = f"-{gib(one.saving_bytes):>10} = {gib(one.allocated_bytes):>10}{speed}"
    return f"  {one.what:<{width}}  {figures}  {one.verdict:<12}  {written_as(one.change)}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
