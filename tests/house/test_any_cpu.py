"""Run, evaluation and merge hold and compute in the same types, on this CPU and on one that has no more than AVX2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafit.merging.merge import merge
from lorafit.precision import computes_bfloat16, cpu_computes_bfloat16
from support import ROOT
from support.commands import AVX2
from support.eval_cases import evaluated, short_own_texts  # noqa: F401
from support.runs import QUICK, run, small_recipe
from support.tiny import build_base

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ON_AVX2 = (
    "tests/house/test_any_cpu.py::test_what_auto_leaves_open_is_one_type_from_training_to_the_merged_model",
    "tests/training/test_training.py::test_a_quantised_base_still_passes_gradients_after_an_evaluation",
)
"""Where types decide most, besides all tests of `scripts/check --avx2`."""


@pytest.mark.usefixtures("short_own_texts")
@pytest.mark.parametrize("quantization", [None, NF4], ids=["plain", "nf4"])
def test_what_auto_leaves_open_is_one_type_from_training_to_the_merged_model(
    quantization: dict[str, Any] | None, tmp_path: Path
) -> None:
    base = build_base(tmp_path / "base", dtype=torch.bfloat16)
    sections: dict[str, Any] = {"quantization": quantization} if quantization else {}
    training = QUICK | {"bf16": "auto", "max_steps": 6, "learning_rate": 2e-2}
    result, said = run(small_recipe(tmp_path, base, training=training, **sections))
    is_native = computes_bfloat16()
    assert any(line.startswith("base weights in float32: ") for line in said) == (not is_native)
    assert any(line.startswith(f"bfloat16 autocast {'on' if is_native else 'off'}: ") for line in said)
    kinds = {tensor.dtype for tensor in load_file(Path(result.adapter) / "adapter_model.safetensors").values()}
    assert kinds == {torch.bfloat16 if quantization and is_native else torch.float32}
    onto = "dequantized" if quantization and is_native else None  # the nearer is looked for where it is verified
    merged = merge(
        Path(result.run), out=None, dtype=None, max_shard_size=None, base=None, onto=onto,
        verify=quantization is not None and not is_native,  # test_qlora.py verifies here
        progress=lambda total: lambda done: None, cache_dir=None,
    )  # fmt: skip
    assert {tensor.dtype for tensor in load_file(Path(merged.out) / "model.safetensors").values()} == {torch.bfloat16}
    figures = evaluated(result.run)[0].held_out.figures
    metrics = map(json.loads, (Path(result.run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = [entry["eval_loss"] for entry in metrics if "eval_loss" in entry]
    rounding = 0.02 if is_native else 1e-5
    assert figures["base"]["loss"] == pytest.approx(losses[0], rel=rounding)
    assert figures["adapter"]["loss"] == pytest.approx(losses[-1], rel=rounding)
    assert figures["merged"]["loss"] == pytest.approx(losses[-1], rel=0.02)


@pytest.mark.skipif(not cpu_computes_bfloat16(), reason="this CPU is one: every test tries it")
def test_all_that_types_decide_passes_on_a_cpu_that_has_no_more_than_avx2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "pytest")]
    environment = os.environ | AVX2 | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *ON_AVX2], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
