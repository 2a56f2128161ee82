"""Which levers a run uses, settled on its own model before the first step."""

from __future__ import annotations

import torch
from peft import PeftModel

from lorafit.recipe.sections import SpeedSection
from lorafit.speed.answer_head import use_answer_head
from lorafit.speed.answer_head import why_not as why_no_answer_head
from lorafit.speed.fused_lora import fuse
from lorafit.speed.varlen_attention import use_varlen_attention


def speed_up(
    model: PeftModel, section: SpeedSection, *, packing: bool, compiled: bool, is_whole: bool, dtype: torch.dtype
) -> tuple[str, ...]:
    """Pull the levers that the section allows and this model takes; one line for each that is on, or why it is not.

    Called when TRL has put its head on the model. `dtype` is what products are computed in; `is_whole` is false where
    FSDP or ZeRO spread the weights over processes, whose own hooks the levers would pass by.
    """
    base = model.get_base_model()
    wanted = {
        "packed attention by document": section.varlen_attention and packing,
        "fused LoRA": section.fused_lora,
        "answer head": section.answer_head,
    }
    names = [name for name, is_wanted in wanted.items() if is_wanted]
    if not is_whole or compiled:
        why = "torch_compile fuses by itself" if compiled else "the weights are spread over processes"
        return (f"plain path for {', '.join(names)}: {why}",) if names else ()
    lines = []
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
        if reason is None:
            use_answer_head(base)
        lines.append(_line("answer head", reason))
    return tuple(lines)


def _line(lever: str, reason: str | None) -> str:
    return f"{lever} on" if reason is None else f"{lever} off: {reason}"
