"""A mixture of experts: what is trained of it is said the same way before, in and after a run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from lorafit.builders.experts import advise_on_experts
from lorafit.planning.known_shapes import architecture
from lorafit.planning.targets import target_table
from lorafit.recipe.recipe import CausalLmRecipe
from lorafit.recipe.sections import ModelSection
from lorafit.training.model_card import model_card
from lorafit.validation import validate
from support.reports import FACTS, HISTORY
from support.runs import run, small_recipe
from support.tiny import build_base

MIXTURE = Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim, which its table of fields leaves out
    vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
    max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("mixture") / "base", config=MIXTURE)


def test_targets_validate_run_and_card_tell_one_story(mixture: Path, tmp_path: Path) -> None:
    loaded = small_recipe(tmp_path, mixture, lora={"r": 4, "target_modules": "all-linear"})
    told = target_table(architecture(ModelSection(model_name_or_path=str(mixture))), r=4).all_linear().lora_parameters
    advice = [str(one) for one in validate(loaded.path).advice if one.name == "experts"]
    assert len(advice) == 1 and "takes the 4 experts of each layer along, gate and up at rank 8" in advice[0]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        result, said = run(loaded)
    assert not [one for one in warned if "_pattern keys" in str(one.message)]
    assert f"advice: {advice[0]}" in said
    assert any(line.startswith(f"adapter: 14 modules, {told:,} trained parameters") for line in said), said
    manifest = json.loads((Path(result.run) / "manifest.json").read_text())
    rows = {module["name"]: module for module in manifest["modules"]}
    assert sum(module["parameters"] for module in rows.values()) == told, "each counts once"
    gate_up, down = (rows[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    assert (gate_up["r"], down["r"], gate_up["kind"]) == (8, 4, "experts")
    assert rows["model.layers.0.mlp.gate"]["kind"] == "router"
    card = (Path(result.run) / "adapter" / "README.md").read_text()
    assert f"| all | 14 |  |  |  | {told:,} |" in card and "for vLLM merge it first" in card


def test_the_card_offers_no_vllm_for_what_was_adapted_of_experts() -> None:
    recipe = CausalLmRecipe.model_validate(
        {
            "output_dir": "run",
            "model": {"model_name_or_path": "org/base"},
            "data": {"train": [{"path": "/data/rows.jsonl"}]},
        }
    )
    assert "vllm serve" in model_card(recipe, facts=FACTS, history=HISTORY)
    first: dict[str, Any] = FACTS["modules"][0]
    experts = first | {"name": "model.layers.0.mlp.experts.down_proj", "kind": "experts"}
    card = model_card(recipe, facts=FACTS | {"modules": [*FACTS["modules"], experts]}, history=HISTORY)
    assert "vllm serve" not in card and "It adapts experts or their router (`down_proj`): for vLLM merge it" in card


@pytest.mark.parametrize(
    ("changes", "config", "said"),
    [
        ({}, {"model_type": "qwen3_moe", "num_experts": 8}, ["lora.target_modules"]),
        ({"lora": {"target_modules": ["q_proj"]}}, {"model_type": "qwen3_moe", "num_experts": 8}, []),
        ({}, {"model_type": "gpt_oss", "num_local_experts": 8}, []),
        ({}, {"model_type": "llama"}, []),
        ({"silence": ["experts"]}, {"model_type": "qwen3_moe", "num_experts": 8}, []),
        ({"quantization": {"load_in_4bit": True}}, {"model_type": "gpt_oss", "num_local_experts": 8}, ["quantization"]),
        ({"quantization": {"load_in_4bit": True}}, {"model_type": "llama"}, []),
    ],
)
def test_what_is_said_of_experts(changes: dict[str, Any], config: dict[str, Any], said: list[str]) -> None:
    written = {"output_dir": "run", "model": {"model_name_or_path": "b"}, "data": {"train": [{"path": "r.jsonl"}]}}
    recipe = CausalLmRecipe.model_validate(written | changes)
    assert [advice.key for advice in advise_on_experts(recipe, config)] == said
