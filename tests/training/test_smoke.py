"""Every shipped recipe runs in miniature, offline, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.errors import LorafitError, VerificationError
from lorafit.recipe import load
from lorafit.training import smoke as smoke_module
from lorafit.training.smoke import smoke
from support import ROOT
from support.runs import small_recipe
from support.tiny import build_base, llama_config

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_all_shipped_recipes_are_found() -> None:
    assert len(RECIPES) == 11


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_passes_its_smoke_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = smoke(load(path), output_dir=None)
    assert result.steps == 3
    assert list(tmp_path.iterdir()) == [], "something was left behind"


def test_the_run_directory_of_a_smoke_run_stays_when_asked_for(tmp_path: Path, tiny_base: Path) -> None:
    result = smoke(small_recipe(tmp_path, tiny_base), output_dir=tmp_path / "kept")
    assert result.run == str(tmp_path / "kept")
    assert (tmp_path / "kept/adapter/adapter_model.safetensors").is_file()
    assert result.max_abs_logit_difference == 0.0


def test_a_recipe_that_names_a_late_layer_is_tried_with_that_many(tmp_path: Path) -> None:
    lora = {
        "target_modules": ["q_proj"],
        "layers_to_transform": [3],
        "rank_pattern": {r"layers\.3\.self_attn\.q_proj": 2},
    }
    base = build_base(tmp_path / "deep", config=llama_config(num_hidden_layers=4))
    loaded = small_recipe(tmp_path, base, lora=lora)
    assert smoke(loaded, output_dir=None).steps == 3


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"target_modules": ["q_porj"]}},
        {"data": {"train": [{"path": "missing.jsonl"}]}},
    ],
)
def test_what_would_end_the_real_run_ends_the_smoke_run(
    sections: dict[str, Any], tmp_path: Path, tiny_base: Path
) -> None:
    with pytest.raises(LorafitError):
        smoke(small_recipe(tmp_path, tiny_base, **sections), output_dir=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_reloaded_adapter_that_differs_fails_the_smoke_run(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_adapter = smoke_module.PeftModel.from_pretrained

    def damaged(*rest: Any, **named: Any) -> Any:
        model = load_adapter(*rest, **named)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(1.5)
        return model

    monkeypatch.setattr(smoke_module.PeftModel, "from_pretrained", damaged)
    with pytest.raises(VerificationError, match="differs from the trained one"):
        smoke(small_recipe(tmp_path, tiny_base), output_dir=None)


def test_what_needs_a_gpu_is_replaced_and_said(tmp_path: Path, tiny_base: Path) -> None:
    loaded = small_recipe(
        tmp_path,
        tiny_base,
        quantization={"load_in_4bit": True},
        lora={"init_lora_weights": "loftq"},
        training={"optim": "paged_adamw_8bit", "torch_compile": True},
    )
    result = smoke(loaded, output_dir=None)
    text = " ".join(result.changed)
    assert all(word in text for word in ("loftq", "paged_adamw_8bit", "torch_compile"))
