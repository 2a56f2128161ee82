"""Weights whose names or shapes on disk are not those in memory: experts, prefixes, other heads and vocabularies."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter

from lorafit.errors import AdapterError, ModelError
from support.random_adapters import adapted, by_peft, difference, logits, merged, random_adapter, weights
from support.tiny import build_base, byte_tokenizer, llama_config

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SMALL: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def _config(kind: str) -> Any:
    if kind == "mixtral":
        return transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    if kind == "qwen3 moe":
        moe: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
        return transformers.Qwen3MoeConfig(**SMALL, **moe, decoder_sparse_step=1)
    layers: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
    return transformers.GptOssConfig(**SMALL, **layers, num_local_experts=4, num_experts_per_tok=2, head_dim=16)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3 moe", "gpt-oss"])
def test_every_expert_gets_its_own_update(kind: str, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=_config(kind))
    settings = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    adapter = random_adapter(tmp_path / "adapter", base, **settings)
    assert merged(adapter, tmp_path / "merged").streamed
    expected = logits(adapted(adapter, base))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(found) - expected).abs().max() <= 1e-5
    assert (logits(AutoModelForCausalLM.from_pretrained(base)) - expected).abs().max() > 1e-2
    assert weights(tmp_path / "merged").keys() == weights(base).keys()
    assert difference(weights(tmp_path / "merged"), weights(by_peft(adapter, base, tmp_path / "peft"))) == 0
    # In bfloat16 too; peft rounds the update of experts before it adds it, and the sum again.
    half = build_base(tmp_path / "half", config=_config(kind), dtype=torch.bfloat16)
    merged(adapter, tmp_path / "bf16", base=str(half))
    merged(adapter, tmp_path / "fp32", base=str(half), dtype="float32")
    once = {name: tensor.bfloat16() for name, tensor in weights(tmp_path / "fp32").items()}
    assert difference(weights(tmp_path / "bf16"), once) == 0


def _rule(monkeypatch: pytest.MonkeyPatch, kind: str, rule: WeightConverter) -> None:
    """Let models of this kind lie on disk in another form; every shipped rule of the form belongs to a large model."""
    conversion_mapping.get_checkpoint_conversion_mapping(kind)  # builds the table
    table: Any = conversion_mapping._checkpoint_conversion_mapping_cache  # which is None until then
    monkeypatch.setitem(table, kind, [rule])


def test_a_weight_that_is_fused_in_memory_is_changed_in_each_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, fused = [r"\.gate_proj.weight", r"\.up_proj.weight"], r"\.gate_up_proj.weight"
    _rule(monkeypatch, "phi3", WeightConverter(parts, fused, [Concatenate(dim=0)]))
    base = build_base(tmp_path / "base", config=transformers.Phi3Config(**SMALL))
    assert any(name.endswith("up_proj.weight") and "gate_up" not in name for name in weights(base)), "not cut on disk"
    adapter = random_adapter(tmp_path / "adapter", base, target_modules=["gate_up_proj", "qkv_proj"])
    assert merged(adapter, tmp_path / "merged").streamed
    assert difference(weights(tmp_path / "merged"), weights(by_peft(adapter, base, tmp_path / "peft"))) == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(found) - logits(adapted(adapter, base))).abs().max() <= 1e-5


@pytest.mark.parametrize("target", ["gate_proj", "up_proj"])
def test_a_weight_that_is_cut_out_of_a_larger_one_is_merged_by_peft(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = WeightConverter("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    _rule(monkeypatch, "llama", rule)
    base = build_base(tmp_path / "base")
    assert any("both" in name for name in weights(base)), "not one on disk"
    adapter = random_adapter(tmp_path / "adapter", base, target_modules=[target])
    assert not merged(adapter, tmp_path / "merged").streamed
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(found) - logits(adapted(adapter, base))).abs().max() <= 1e-5
    # What leaves such weights alone can be streamed.
    assert merged(random_adapter(tmp_path / "q", base, target_modules=["q_proj"]), tmp_path / "q-merged").streamed


def test_a_bias_that_the_architecture_has_no_place_for_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", tiny_base, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ModelError, match=r"q_proj.bias to a layer that has none \(lora_bias\)"):
        merged(adapter, tmp_path / "merged")


def test_an_adapter_that_lacks_a_tensor_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", tiny_base, modules_to_save=["lm_head"])
    for missing in ("lora_B", "lm_head"):
        tensors = weights(adapter)
        del tensors[next(name for name in tensors if missing in name)]
        save_file(tensors, adapter / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=rf"lacks .*{missing}"):
            merged(adapter, tmp_path / "merged")


def test_names_with_the_prefixes_of_a_model_of_text_and_images_are_found(tmp_path: Path) -> None:
    vision: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=llama_config(), vision_config=transformers.CLIPVisionConfig(**vision), image_token_index=263
    )
    base = tmp_path / "base"
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    auto_class = transformers.AutoModelForImageTextToText
    names = set(weights(base))
    assert any(name.startswith("language_model.model.") for name in names), "no other names on disk: nothing to test"
    target = r".*language_model.*(q_proj|down_proj)"
    adapter = random_adapter(tmp_path / "adapter", base, auto_class=auto_class, target_modules=target)
    assert merged(adapter, tmp_path / "merged").streamed
    expected = logits(adapted(adapter, base, auto_class=auto_class))
    assert (logits(auto_class.from_pretrained(tmp_path / "merged")) - expected).abs().max() <= 1e-5
    assert set(weights(tmp_path / "merged")) == names
    assert (
        difference(
            weights(tmp_path / "merged"), weights(by_peft(adapter, base, tmp_path / "peft", auto_class=auto_class))
        )
        == 0
    )


def test_a_classification_head_is_merged_and_named_in_the_config(tmp_path: Path, tiny_base: Path) -> None:
    auto_class = transformers.AutoModelForSequenceClassification
    adapter = _classifier(tmp_path / "adapter", tiny_base, labels=3)
    assert merged(adapter, tmp_path / "merged").streamed
    expected = _classes(adapted(adapter, tiny_base, auto_class=auto_class, num_labels=3))
    found, info = auto_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert (_classes(found) - expected).abs().max() <= 1e-5
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 3
    assert "lm_head.weight" not in weights(tmp_path / "merged")


def _classifier(directory: Path, base: Path, *, labels: int) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
        adapted_model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=4))
        for parameter in adapted_model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        adapted_model.save_pretrained(str(directory))
    return directory


def _classes(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 25).view(2, 12)).logits


def test_a_model_of_encoder_and_decoder_is_merged(tmp_path: Path) -> None:
    config = transformers.T5Config(  # type: ignore[call-arg]  # decoder_start_token_id, not in its table of fields
        vocab_size=264, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    base, auto_class = tmp_path / "base", transformers.AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    auto_class.from_config(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    settings = {"auto_class": auto_class, "task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v", "wo"]}
    adapter = random_adapter(tmp_path / "adapter", base, **settings)
    assert merged(adapter, tmp_path / "merged").streamed

    def scores(model: torch.nn.Module) -> torch.Tensor:
        ids = torch.arange(1, 25).view(2, 12)
        with torch.no_grad():
            return model(input_ids=ids, decoder_input_ids=ids).logits

    expected = scores(adapted(adapter, base, auto_class=auto_class))
    assert (scores(auto_class.from_pretrained(tmp_path / "merged")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_larger_vocabulary_comes_with_the_adapter(is_tied: bool, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", config=llama_config(tie_word_embeddings=is_tied))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(270)
        saved = ["embed_tokens", "lm_head"]
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=saved)
        larger = get_peft_model(model, config)
        for parameter in larger.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        larger.save_pretrained(str(tmp_path / "adapter"))
    assert merged(tmp_path / "adapter", tmp_path / "merged").streamed
    auto_class: Any = AutoModelForCausalLM  # gives two things when asked for both
    found, info = auto_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert found.config.vocab_size == 270
    assert (logits(found) - logits(larger.eval())).abs().max() <= 1e-5


def test_a_base_with_fewer_rows_than_the_adapter_leaves_in_place_is_refused(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(270)
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with pytest.raises(ModelError, match=r"lm_head.weight as \[264, 64\].*\[270, 64\]"):
        merged(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
