"""Which levers a run uses, settled on its own model before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel

from lorafit.recipe import Recipe
from lorafit.speed.answer_head import why_not as why_no_answer_head
from lorafit.speed.fixed_length import why_not as why_no_fixed_length
from lorafit.speed.fused_lora import fuse
from lorafit.speed.varlen_attention import use_varlen_attention


@dataclass(frozen=True)
class Levers:
    """What was settled."""

    lines: tuple[str, ...]
    """For people: each lever that is on, or why it is not."""

    answer_head: bool
    """For the trainer to put on: its base class puts TRL's own head on every model it is given."""

    fixed_length: bool
    """For the trainer, which calls the model."""


def speed_up(model: PeftModel, recipe: Recipe, *, is_whole: bool, dtype: torch.dtype) -> Levers:
    """Pull the levers that the recipe allows and this model takes.

    `dtype` is what products are computed in; `is_whole` is false where FSDP or ZeRO spread the weights over processes,
    whose own hooks the levers would pass by.
    """
    base, section, training = model.get_base_model(), recipe.speed, recipe.training
    wanted = {
        "packed attention by document": section.varlen_attention and training.packing,
        "fused LoRA": section.fused_lora,
        "answer head": section.answer_head,
    }
    names = [name for name, is_wanted in wanted.items() if is_wanted]
    lines, answer_head, fixed_length = [], False, False
    if training.torch_compile and training.packing and section.fixed_length:
        reason = why_no_fixed_length(base, recipe)
        fixed_length = reason is None
        lines.append(_line("packed rows of one length", reason))
    if not is_whole or training.torch_compile:
        why = "torch_compile fuses by itself" if training.torch_compile else "the weights are spread over processes"
        lines += [f"plain path for {', '.join(names)}: {why}"] if names else []
        return Levers(tuple(lines), answer_head, fixed_length)
    if "packed attention by document" in names:
        reason = use_varlen_attention(base, dtype=dtype)
        lines.append(_line("packed attention by document", reason))
    if "fused LoRA" in names:
        fused, kept = fuse(model)
        others = ", ".join(f"{count} of them keep peft's: {reason}" for reason, count in kept.items())
        lines.append(
            f"fused LoRA on {fused} of {fused + sum(kept.values())} modules" + (f"; {others}" if others else "")
        )
    if "answer head" in names:
        reason = why_no_answer_head(base)
        answer_head = reason is None
        lines.append(_line("answer head", reason))
    return Levers(tuple(lines), answer_head, fixed_length)


def _line(lever: str, reason: str | None) -> str:
    return f"{lever} on" if reason is None else f"{lever} off: {reason}"
