"""The base of a smoke run: the real architecture in small, loadable, trainable, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from lorafit.builders.base_model import check_base_model, load_base_model
from lorafit.builders.model_modules import weight_of
from lorafit.builders.smoke_base import shrunken_config, write_smoke_base
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.errors import ModelError
from lorafit.planning.known_shapes import architecture, known_shapes
from lorafit.planning.targets import target_table
from lorafit.recipe.sections import ModelSection, QuantizationSection

LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 64, "long_factor": [1.0] * 64}
MORE: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(),
    "qwen3_moe": Qwen3MoeConfig(),
    "gpt_oss": GptOssConfig(),
    "deepseek_v3": DeepseekV3Config(),
    "qwen3_next": Qwen3NextConfig(),
    "gpt_neox": GPTNeoXConfig(),
    "falcon": FalconConfig(),
    "gemma3": Gemma3TextConfig(),
    "phi3_longrope": Phi3Config(
        hidden_size=4096, max_position_embeddings=131072, rope_parameters={**LONG, "factor": 32.0}
    ),
}
ALL = (*known_shapes(), *MORE)


def real_config(name: str) -> PretrainedConfig:
    return MORE[name] if name in MORE else architecture(ModelSection(model_name_or_path=name))


def written(name: str, tokenizer_dir: Path, out_dir: Path) -> ModelSection:
    return ModelSection(model_name_or_path=str(write_smoke_base(real_config(name), tokenizer_dir, out_dir=out_dir)))


@pytest.mark.parametrize("name", ALL)
def test_it_is_a_whole_small_model_of_the_same_architecture(name: str, tiny_base: Path, tmp_path: Path) -> None:
    section = written(name, tiny_base, tmp_path / "base")
    files, real = check_base_model(section), real_config(name)
    assert files.config["model_type"] == real.model_type
    assert files.total_bytes < 16_000_000
    assert files.vocab_size == 320  # 259 tokens, up to the next multiple of 64
    table, whole = target_table(architecture(section)), target_table(real)
    assert {(target.name, target.kind) for target in table.targets} == {
        (target.name, target.kind) for target in whole.targets
    }


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits", [16, 4])
def test_its_loss_is_finite_and_reaches_every_layer(name: str, bits: int, tiny_base: Path, tmp_path: Path) -> None:
    section = written(name, tiny_base, tmp_path / "base")
    quantization = QuantizationSection(load_in_4bit=True, bnb_4bit_compute_dtype="float32") if bits == 4 else None
    model = load_base_model(section, quantization, dtype=torch.float32, device_map=None)
    ids = torch.tensor([load_tokenizer(section)("def shrunken(config): return config  # and so on" * 2)["input_ids"]])
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert torch.isfinite(loss)
    loss.backward()
    embedding = weight_of(model.get_input_embeddings())
    assert embedding.grad is not None and torch.isfinite(embedding.grad).all() and embedding.grad.abs().sum() > 0


def test_it_is_the_same_every_time_and_leaves_the_random_state_alone(tiny_base: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = check_base_model(written("gpt2", tiny_base, tmp_path / "first"))
    assert torch.equal(torch.rand(1), expected)
    assert check_base_model(written("gpt2", tiny_base, tmp_path / "second")).fingerprint() == first.fingerprint()


def test_what_sets_the_architecture_apart_stays(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(ModelSection(model_name_or_path=str(tiny_base)))
    small = {name: shrunken_config(real_config(name), tokenizer=tokenizer) for name in ALL}
    assert small["gemma-2-2b"].layer_types == ["sliding_attention", "full_attention"]
    assert small["qwen3_next"].layer_types == ["linear_attention", "full_attention"]
    assert small["llama3-8b"].num_key_value_heads == 2
    assert small["phi-3-mini"].num_key_value_heads == small["phi-3-mini"].num_attention_heads == 4
    assert small["smollm2-135m"].tie_word_embeddings and not small["llama3-8b"].tie_word_embeddings
    assert small["gpt2"].n_positions == 1024
    assert small["mistral-7b"].sliding_window is None
    for config in small.values():
        assert config.num_hidden_layers == 2
        assert (config.eos_token_id, config.pad_token_id) == (2, 0)
    assert real_config("mixtral").num_hidden_layers == 32


def test_an_architecture_that_does_not_predict_the_next_token_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    config = BertConfig(architectures=["BertForMaskedLM"])
    with pytest.raises(ModelError, match="is a BertForMaskedLM, not a model that predicts the next token"):
        write_smoke_base(config, tiny_base, out_dir=tmp_path / "base")
    assert not (tmp_path / "base").exists()
