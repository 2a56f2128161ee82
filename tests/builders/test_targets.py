"""`lorafit targets`: the table agrees with PEFT, and the shipped shapes with what their makers publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_FUSED_TARGETS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from lorafit.builders.experts import TAKEN_ALONG
from lorafit.cli import _exit_code
from lorafit.errors import ModelError
from lorafit.planning.known_shapes import SHAPES, architecture, known_shape, known_shapes
from lorafit.planning.targets import target_table
from lorafit.recipe.sections import ModelSection
from lorafit.report.target_table import target_table_text
from support.tiny import llama_config

SMALL: dict[str, Any] = {"vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": llama_config(),
    "mistral": MistralConfig(**SMALL, intermediate_size=128, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=128, num_key_value_heads=2),
    "phi": PhiConfig(**SMALL, intermediate_size=128),
    "falcon": FalconConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=128),
    "bloom": BloomConfig(vocab_size=264, hidden_size=64, n_layer=2, n_head=4),
    "bert": BertConfig(**SMALL, intermediate_size=128, architectures=["BertForMaskedLM"]),
}
assert len(ARCHITECTURES) == 9
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen3-4b": 4_022_468_096,
    "mistral-7b": 7_248_023_552,
    "phi-3-mini": 3_821_079_552,
    "gemma-2-2b": 2_614_341_888,
    "smollm2-135m": 134_515_008,
    "gpt2": 124_439_808,
}
"""Parameters as the models' pages state them."""


def adapter_parameters(config: PretrainedConfig, **lora: Any) -> int:
    """What PEFT itself puts on the model."""
    is_masked = config.architectures == ["BertForMaskedLM"]
    with torch.device("meta"):
        model = BertForMaskedLM(cast(BertConfig, config)) if is_masked else AutoModelForCausalLM.from_config(config)
    adapted = peft.get_peft_model(model, LoraConfig(fan_in_fan_out=config.model_type == "gpt2", **lora))
    return int(adapted.get_nb_trainable_parameters()[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_counts_what_peft_adapts(name: str) -> None:
    config = ARCHITECTURES[name]
    table = target_table(config, r=4)
    assert table.all_linear().lora_parameters == adapter_parameters(config, r=4, target_modules="all-linear")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_names_to_paste_adapt_the_same_modules_as_all_linear(name: str) -> None:
    config = ARCHITECTURES[name]
    choice = target_table(config, r=4).all_linear()
    assert adapter_parameters(config, r=4, target_modules=list(choice.names)) == choice.lora_parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_attention_names_adapt_the_attention_only(name: str) -> None:
    config = ARCHITECTURES[name]
    choice = target_table(config, r=4).attention()
    assert adapter_parameters(config, r=4, target_modules=list(choice.names)) == choice.lora_parameters
    assert 0 < choice.lora_parameters < target_table(config, r=4).all_linear().lora_parameters


def test_experts_are_parameters() -> None:
    config = MixtralConfig(**SMALL, intermediate_size=128, num_key_value_heads=2, num_local_experts=4)
    table = target_table(config, r=4)
    assert table.experts().names == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    counted = adapter_parameters(config, r=4, target_modules=[], target_parameters=list(table.experts().names))
    assert table.experts().lora_parameters == counted
    gate_up = next(target for target in table.targets if target.name == "mlp.experts.gate_up_proj")
    assert (gate_up.shape, gate_up.count) == ((4, 256, 64), 2)


MIXTURES = {
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, intermediate_size=128, num_key_value_heads=2, num_experts=4, moe_intermediate_size=32
    ),
    "mixtral": MixtralConfig(**SMALL, intermediate_size=128, num_key_value_heads=2, num_local_experts=4),
    "gpt_oss": GptOssConfig(**SMALL, intermediate_size=128, num_key_value_heads=2, num_local_experts=4),
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_on_a_mixture_counts_what_peft_takes_along(name: str) -> None:
    table = target_table(MIXTURES[name], r=4)
    assert table.all_linear().lora_parameters == adapter_parameters(MIXTURES[name], r=4, target_modules="all-linear")
    assert table.takes_experts() == (name != "gpt_oss") == (name in TAKEN_ALONG)
    text = target_table_text(table)
    assert ("all-linear leaves them out" in text) == (name == "gpt_oss")
    assert ("peft takes experts and router along, mlp.experts.gate_up_proj at r = 8" in text) == (name != "gpt_oss")


def test_the_mixtures_that_peft_takes_along_are_those_we_say() -> None:
    mapped = {kind for kind, like in _MODEL_TO_CONVERSION_PATTERN.items() if like in _MOE_FUSED_TARGETS}
    newer = {"Dots3NoteTextModel"}  # than transformers 5.21
    assert mapped | newer == TAKEN_ALONG


def test_experts_stored_the_other_way_round_are_shown_as_out_by_in() -> None:
    config = GptOssConfig(**SMALL, intermediate_size=128, num_key_value_heads=2, num_local_experts=4)
    shapes = {target.name: target.shape for target in target_table(config).targets}
    assert shapes["mlp.experts.gate_up_proj"] == (4, 256, 64)
    assert shapes["mlp.experts.down_proj"] == (4, 64, 128)


def test_a_conv1d_is_shown_as_out_by_in_and_names_shared_by_two_modules_say_which() -> None:
    table = target_table(ARCHITECTURES["gpt2"])
    shapes = {target.name: (target.kind, target.shape, target.count) for target in table.targets}
    assert shapes["c_attn"] == ("Conv1D", (192, 64), 2)
    assert shapes["mlp.c_proj"] == ("Conv1D", (64, 256), 2)
    assert shapes["attn.c_proj"] == ("Conv1D", (64, 64), 2)


def test_the_head_and_embeddings_are_shown_and_not_taken() -> None:
    targets = {target.name: target for target in target_table(llama_config()).targets}
    assert (targets["lm_head"].part, targets["lm_head"].all_linear) == ("head", False)
    assert (targets["embed_tokens"].kind, targets["embed_tokens"].all_linear) == ("Embedding", False)


def test_every_shipped_shape_has_its_published_parameter_count() -> None:
    assert set(PUBLISHED) == set(known_shapes()) == {path.parent.name for path in SHAPES.glob("*/config.json")}
    for name, count in PUBLISHED.items():
        assert known_shapes()[name]["parameters"] == count
        assert target_table(AutoConfig.from_pretrained(SHAPES / name)).parameters == count, name


def test_a_hub_id_of_a_shipped_shape_needs_neither_cache_nor_network() -> None:
    assert known_shape("meta-llama/Meta-Llama-3-8B") == known_shape("llama3-8b") == "llama3-8b"
    assert architecture(ModelSection(model_name_or_path="Qwen/Qwen3-4B")).hidden_size == 2560
    assert known_shape("org/unknown") is None
    with pytest.raises(ModelError, match="org/unknown is not whole in the cache"):
        architecture(ModelSection(model_name_or_path="org/unknown"))


def test_a_directory_of_the_same_name_comes_before_a_shipped_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_config().save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert architecture(ModelSection(model_name_or_path="gpt2")).model_type == "llama"


def test_the_command_prints_lines_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["targets", "llama3-8b", "--r", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("LlamaForCausalLM: 8,030,261,248 parameters. LoRA: 8 x (in + out) x count at r = 8\n")
    assert "\n  target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]\n" in text
    assert "\nattention only (LoRA, arXiv 2106.09685): 6,815,744 LoRA parameters, 0.08% of the base\n" in text


def test_the_command_prints_json(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["targets", str(tiny_base), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["r"] == 16
    assert facts["attention"]["names"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert [target["count"] for target in facts["targets"]] == [1, 2, 2, 2, 2, 2, 2, 2, 1]


def test_a_model_that_is_not_there_ends_with_exit_4(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["targets", "./nowhere"]) == 4
    assert capsys.readouterr().err == "error: ./nowhere: there is no such directory: correct the path\n"
