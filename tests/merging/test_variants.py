"""Every kind of LoRA merges into the model it was, in float32 and bfloat16, and as by peft where peft is right."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig

from support.random_adapters import adapted, by_peft, difference, logits, merged, random_adapter, weights
from support.tiny import build_base, llama_config

pytestmark = pytest.mark.xdist_group("merging variants")  # its fixtures cost too much to be made by each worker

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "scale that is no power of two": {"lora_alpha": 7, "r": 3},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 8, r"layers\.0\..*gate_proj": 2}, "alpha_pattern": {"down_proj": 2}},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "trained head": {"modules_to_save": ["lm_head"]},
    "trained embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trained norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "trained tokens": {"trainable_token_indices": [1, 5, 20]},
    "random start": {"init_lora_weights": False},
}
WITH_BIAS: dict[str, dict[str, Any]] = {
    "lora bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "trained biases": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
}
TIED: dict[str, dict[str, Any]] = {
    "lora": {},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tied adapters": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "trained head": {"modules_to_save": ["lm_head"]},
    "trained embedding": {"modules_to_save": ["embed_tokens"]},
    "trained embedding, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "trained tokens": {"trainable_token_indices": [1, 5, 20]},
}
STAYS_TIED = ("lora", "tied adapters", "trained embedding, kept tied", "trained tokens")
PEFT_IS_WRONG = ("embedding", "head", "embedding and head", "tied adapters")
PEFT_ROUNDS_TWICE = ("embedding",)
"""In 16 bits it rounds the update of an embedding before it adds it, and the sum again."""
NORMS_OF_COLUMNS = ("dora embedding", "transposed dora")
"""Their sums run over all rows: in blocks, and in float64, they end in other last bits than peft's."""


def gpt2_config(**changes: Any) -> GPT2Config:
    settings = {"vocab_size": 264, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "pad_token_id": 0}
    return GPT2Config(**(settings | {"bos_token_id": 2, "eos_token_id": 2} | changes))


CONV1D: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "dora": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    "lora bias": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bases by configuration and type, each built once."""
    built: dict[str, Path] = {}

    def base(name: str, config: PretrainedConfig, dtype: torch.dtype) -> Path:
        key = f"{name}-{dtype}"
        if key not in built:
            built[key] = build_base(tmp_path_factory.mktemp("base"), config=config, dtype=dtype)
        return built[key]

    return base


def _check(directory: Path, bases: Any, name: str, config: PretrainedConfig, settings: dict[str, Any]) -> None:
    base = bases(name, config, torch.float32)
    adapter = random_adapter(directory / "adapter", base, **settings)
    result = merged(adapter, directory / "merged")
    assert result.streamed
    expected = logits(adapted(adapter, base))
    found, notes = _loaded(directory / "merged")
    assert notes == []
    assert (logits(found) - expected).abs().max() <= 1e-5
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - expected).abs().max() > 1e-2, "no effect to see"
    # The same adapter on the same base in bfloat16.
    half = bases(name, config, torch.bfloat16)
    merged(adapter, directory / "bf16", base=str(half))
    merged(adapter, directory / "fp32", base=str(half), dtype="float32")
    once = {name: tensor.bfloat16() for name, tensor in weights(directory / "fp32").items()}
    assert difference(weights(directory / "bf16"), once) == 0


def _loaded(directory: Path) -> tuple[torch.nn.Module, list[str]]:
    """The model as a stranger loads it, and every warning."""
    notes: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        auto_class: Any = AutoModelForCausalLM  # gives two things when asked for both
        model, found = auto_class.from_pretrained(directory, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    notes += [f"{kind}: {names}" for kind, names in found.items() if names]
    return model.eval(), notes


def _check_against_peft(directory: Path, bases: Any, name: str, config: PretrainedConfig, *, variant: str) -> None:
    for dtype in (torch.float32,) if variant in PEFT_ROUNDS_TWICE else (torch.float32, torch.bfloat16):
        base = bases(name, config, dtype)
        out = directory / str(dtype)
        merged(directory / "adapter", out, base=str(base))
        allowed = (1e-7 if dtype == torch.float32 else 2**-8) if variant in NORMS_OF_COLUMNS else 0
        assert difference(weights(out), weights(by_peft(directory / "adapter", base, directory / "peft"))) <= allowed


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_model_is_the_adapted_one(variant: str, tmp_path: Path, bases: Any) -> None:
    _check(tmp_path, bases, "llama", llama_config(), VARIANTS[variant])
    _check_against_peft(tmp_path, bases, "llama", llama_config(), variant=variant)


@pytest.mark.parametrize("variant", WITH_BIAS)
def test_biases_are_merged(variant: str, tmp_path: Path, bases: Any) -> None:
    config = llama_config(attention_bias=True)
    _check(tmp_path, bases, "biased", config, WITH_BIAS[variant])
    _check_against_peft(tmp_path, bases, "biased", config, variant=variant)


@pytest.mark.parametrize("variant", CONV1D)
def test_transposed_weights_are_merged(variant: str, tmp_path: Path, bases: Any) -> None:
    _check(tmp_path, bases, "gpt2", gpt2_config(), CONV1D[variant])
    _check_against_peft(tmp_path, bases, "gpt2", gpt2_config(), variant=f"transposed {variant}")


@pytest.mark.parametrize("variant", TIED)
def test_tied_weights_are_written_apart_where_the_adapter_parts_them(variant: str, tmp_path: Path, bases: Any) -> None:
    config = llama_config(tie_word_embeddings=True)
    _check(tmp_path, bases, "tied", config, TIED[variant])
    written = json.loads((tmp_path / "merged/config.json").read_text())
    assert written["tie_word_embeddings"] is (variant in STAYS_TIED)
    assert ("lm_head.weight" in weights(tmp_path / "merged")) is (variant not in STAYS_TIED)
    if variant not in PEFT_IS_WRONG:
        _check_against_peft(tmp_path, bases, "tied", config, variant=variant)


def test_every_setting_of_peft_is_merged_or_known_not_to_be() -> None:
    known = {
        *(
            "r",
            "target_modules",
            "exclude_modules",
            "lora_alpha",
            "lora_dropout",
            "fan_in_fan_out",
            "bias",
            "use_rslora",
        ),
        *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
        *("alpha_pattern", "trainable_token_indices", "eva_config", "corda_config", "use_dora", "lora_bias"),
        *("target_parameters", "ensure_weight_tying", "layer_replication"),
        # Kinds that peft gives a layer of their own, or a variant: not streamed, see `_read_changes`.
        *("megatron_config", "megatron_core", "loftq_config", "lora_ga_config", "velora_config", "use_qalora"),
        *("alora_invocation_tokens", "qalora_group_size", "monteclora_config", "use_bdlora", "arrow_config"),
        *("kasa_config", "runtime_config"),
        # What it is, not what it does.
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode",),
    }
    assert set(LoraConfig.__dataclass_fields__) == known
