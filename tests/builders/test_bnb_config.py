"""Every key of `quantization` changes the library object, and nothing else gets in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorafit.builders.bnb_config import bnb_config
from lorafit.errors import ModelError
from lorafit.recipe.sections import QuantizationSection

FLIPPED: dict[str, tuple[Any, Any]] = {
    "load_in_4bit": (False, False),
    "load_in_8bit": (True, True),
    "bnb_4bit_quant_type": ("fp4", "fp4"),
    "bnb_4bit_use_double_quant": (False, False),
    "bnb_4bit_compute_dtype": ("float16", torch.float16),
    "bnb_4bit_quant_storage": ("bfloat16", torch.bfloat16),
    "llm_int8_threshold": (0.0, 0.0),
    "llm_int8_skip_modules": (["lm_head", "q_proj"], ["lm_head", "q_proj"]),
}


def test_every_key_is_tried() -> None:
    assert set(FLIPPED) | {"extra"} == set(QuantizationSection.model_fields)


@pytest.mark.parametrize("key", FLIPPED)
def test_a_flipped_key_changes_the_library_object(key: str) -> None:
    value, expected = FLIPPED[key]
    base: dict[str, Any] = {} if key == "load_in_8bit" else {"load_in_4bit": True}
    before = bnb_config(QuantizationSection(**base))
    after = bnb_config(QuantizationSection(**{**base, key: value}))
    assert getattr(before, key) != expected
    assert getattr(after, key) == expected


def test_further_arguments_reach_the_library_object() -> None:
    section = QuantizationSection(load_in_8bit=True, extra={"llm_int8_has_fp16_weight": True})
    assert bnb_config(section).llm_int8_has_fp16_weight is True
    assert bnb_config(QuantizationSection(load_in_8bit=True)).llm_int8_has_fp16_weight is False


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            {"load_in_2bit": True},
            "quantization.extra: load_in_2bit is not an argument of BitsAndBytesConfig; it takes ",
        ),
        ({"load_in_4bit": True}, "quantization.extra: load_in_4bit is a key of quantization; write it there"),
    ],
)
def test_arguments_that_the_library_would_swallow_are_refused(extra: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        bnb_config(QuantizationSection(load_in_8bit=True, extra=extra))
    assert str(caught.value).startswith(expected)


def test_the_defaults_are_those_of_the_qlora_paper() -> None:
    config = bnb_config(QuantizationSection(load_in_4bit=True))
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
