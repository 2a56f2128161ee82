"""What becomes of a mixture of experts, as its config.json tells it. No torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lorafit.recipe import Advice
from lorafit.recipe.recipe import Recipe

_TAKEN_ALONG = """
    Dots3NoteTextModel UnlimitedOcrTextModel afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1
    ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash
    mellum minimax minimax_m2 mixtral olmoe qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_text
    qwen3_omni_moe_thinker solar_open
"""

TAKEN_ALONG = frozenset(_TAKEN_ALONG.split())
"""Architectures whose fused experts and router peft adapts for `all-linear`, gate and up together at twice the rank
(peft 0.21, `_convert_peft_config_moe`); those of others it leaves as they are."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def number_of_experts(config: Mapping[str, Any]) -> int:
    """Of a layer; 0 of a model that is no mixture."""
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    return next((text[key] for key in COUNTS if type(text.get(key)) is int), 0)


def advise_on_experts(recipe: Recipe, config: Mapping[str, Any]) -> Iterator[Advice]:
    """What is trained of the experts without being named, and what of them stays as large as it is."""
    count, lora = number_of_experts(config), recipe.lora
    if count < 2 or "experts" in recipe.silence:
        return
    if lora.target_modules == "all-linear" and config.get("model_type") in TAKEN_ALONG and recipe.adalora is None:
        message = f"takes the {count} experts of each layer along, gate and up at rank {2 * lora.r}, and the router;"
        mend = "`lorafit targets` prints the names without them, for vLLM such an adapter is merged first"
        yield Advice("experts", "lora.target_modules", f"all-linear {message} {mend}")
    if recipe.quantization is not None:
        bits = "4" if recipe.quantization.load_in_4bit else "8"
        message = f"bitsandbytes leaves experts that are fused in 16 bits, not {bits}: `lorafit plan` counts them so"
        yield Advice("experts", "quantization", message)


@contextmanager
def used_patterns_are_known() -> Iterator[None]:
    """Without peft's warning that the ranks it gives fused experts itself are ignored: they are not (peft 0.21,
    `_convert_peft_config_moe`)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys .*gate_up_proj'\]")
        yield
