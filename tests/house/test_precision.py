"""What a CPU without bfloat16 makes of `auto`: float32, in the base, the products and the autocast alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorafit import precision
from lorafit.builders.base_model import load_base_model
from lorafit.preflight import Machine, bf16_choice, dtype_choice, product_choice
from lorafit.recipe.recipe import CausalLmRecipe
from lorafit.recipe.sections import ModelSection, QuantizationSection, TrainingSection
from support.commands import AVX2
from support.tiny import build_base

OLD_CPU = Machine(device="cpu", name="Old CPU", gpus=0, has_bf16=False, memory_bytes=2**33)
NEW_CPU = Machine(device="cpu", name="New CPU", gpus=0, has_bf16=True, memory_bytes=2**33)
T4 = Machine(device="cuda", name="Tesla T4", gpus=1, has_bf16=False, memory_bytes=2**34)


def recipe(dtype: str = "auto") -> CausalLmRecipe:
    return CausalLmRecipe.model_validate(
        {"model": {"model_name_or_path": "base", "dtype": dtype}, "data": {"train": [{"path": "rows.jsonl"}]}}
    )


@pytest.mark.parametrize("narrowed", [AVX2, *({name: value} for name, value in AVX2.items())])
def test_a_cpu_that_is_narrowed_to_avx2_does_not_compute_bfloat16(narrowed: dict[str, str]) -> None:
    code = "from lorafit.preflight import this_machine; print(this_machine().has_bf16)"
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | hidden | narrowed, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the choice of a CPU")
@pytest.mark.parametrize(("native", "loaded"), [(True, "bfloat16"), (False, "float32")])
def test_a_base_of_auto_is_held_in_what_the_cpu_computes(
    native: bool, loaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_computes_bfloat16", lambda: native)
    directory = build_base(tmp_path / "base", dtype=torch.bfloat16)
    section = ModelSection(model_name_or_path=str(directory))
    model = load_base_model(section, None, dtype=section.dtype, device_map=None)
    assert model.dtype == getattr(torch, loaded)
    four_bits = QuantizationSection(load_in_4bit=True)
    quantized = load_base_model(section, four_bits, dtype=section.dtype, device_map=None)
    assert quantized.model.layers[0].self_attn.q_proj.compute_dtype == getattr(torch, loaded)
    assert quantized.model.embed_tokens.weight.dtype == getattr(torch, loaded)


def test_what_the_recipe_says_is_obeyed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_computes_bfloat16", lambda: False)
    for written in ("bfloat16", "float16", "float32"):
        assert precision.base_dtype(written) == precision.compute_dtype(written) == written


def test_the_choice_is_said_with_its_reason() -> None:
    chosen = dtype_choice(recipe(), OLD_CPU)
    assert chosen is not None
    assert (chosen.value, chosen.reason) == ("float32", "Old CPU does not compute bfloat16 natively")
    assert bf16_choice(TrainingSection(), OLD_CPU).value is False
    assert dtype_choice(recipe(), NEW_CPU) is None
    assert dtype_choice(recipe("float32"), OLD_CPU) is None


def test_a_16_bit_type_that_would_be_emulated_comes_with_advice() -> None:
    for dtype in ("bfloat16", "float16"):
        chosen = dtype_choice(recipe(dtype), OLD_CPU)
        assert chosen is not None
        assert chosen.value == dtype
        assert "Old CPU emulates it" in chosen.reason and "write auto" in chosen.reason


def test_4_bit_products_and_autocast_that_would_be_emulated_come_with_advice() -> None:
    written = {key: recipe().model_dump() for key in ("auto", "float32", "bfloat16", "float16")}
    for dtype, sections in written.items():
        sections["quantization"] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
        chosen = product_choice(CausalLmRecipe.model_validate(sections), OLD_CPU)
        assert (chosen is None) == (dtype in ("auto", "float32"))
        assert chosen is None or (chosen.value == dtype and "Old CPU emulates it" in chosen.reason)
        assert product_choice(CausalLmRecipe.model_validate(sections), NEW_CPU) is None
    assert "Old CPU emulates it" in bf16_choice(TrainingSection(bf16=True), OLD_CPU).reason
    assert bf16_choice(TrainingSection(bf16=True), NEW_CPU).reason == "training.bf16"
    assert bf16_choice(TrainingSection(bf16=False), OLD_CPU).reason == "training.bf16"


def test_a_gpu_without_bfloat16_is_told_what_to_write() -> None:
    chosen = dtype_choice(recipe(), T4)
    assert chosen is not None
    assert "training.fp16: true and model.dtype: float16" in chosen.reason
    assert dtype_choice(recipe("float16"), T4) is None
