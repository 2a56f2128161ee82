"""Every kind of LoRA trains, and what it leaves is, in plain PEFT, the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model

from lorafit.training import save
from support.runs import logits, reloaded, run, small_recipe
from support.tiny import build_base

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"lora": {"use_rslora": True, "r": 8}},
    "dora": {"lora": {"use_dora": True}},
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "patterns": {"lora": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"down_proj": 2}}},
    "regular expression": {"lora": {"target_modules": r".*\.(q|v)_proj"}},
    "some layers": {"lora": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}},
    "layers pattern": {
        "lora": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    },
    "exclude": {"lora": {"exclude_modules": ["gate_proj"]}},
    "embedding": {"lora": {"target_modules": ["q_proj", "embed_tokens"]}},
    "trained head": {"lora": {"modules_to_save": ["lm_head"]}},
    "trained tokens": {"lora": {"trainable_token_indices": [1, 2]}},
    "gaussian": {"lora": {"init_lora_weights": "gaussian"}},
    "orthogonal": {"lora": {"init_lora_weights": "orthogonal"}},
    "random start": {"lora": {"init_lora_weights": False}},
    "eva": {"lora": {"init_lora_weights": "eva"}},
    "lora+": {"optimizer": {"loraplus_lr_ratio": 16.0}},
    "neftune": {"training": {"neftune_noise_alpha": 5.0}},
    "packed": {"training": {"packing": True, "max_length": 128}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
}
CONVERTED: dict[str, dict[str, Any]] = {
    "pissa": {"lora": {"init_lora_weights": "pissa"}},
    "olora": {"lora": {"init_lora_weights": "olora"}},
    "corda": {"lora": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}},
}


def _train_and_reload(
    directory: Path, base: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **load_keys: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the trained model, of the reloaded adapter, and of the reloaded model with the adapter off."""
    trained: list[torch.Tensor] = []
    write = save.write_adapter

    def look_and_write(model: Any, *rest: Any, **named: Any) -> None:
        trained.append(logits(model.eval()))
        write(model, *rest, **named)

    monkeypatch.setattr(save, "write_adapter", look_and_write)
    training = {"max_steps": 6} if "adalora" in changes else {}
    changes = changes | {"training": training | changes.get("training", {})}
    result, _ = run(small_recipe(directory, base, **{"training": _quick() | changes.pop("training"), **changes}))
    model = reloaded(result, base, **load_keys)
    # Repacked for AVX512-BF16, 4-bit weights are unpacked wrongly by peft's DoRA (bitsandbytes 0.50, on CPU).
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    after = logits(model)
    if (changes.get("lora") or {}).get("bias", "none") != "none":
        return trained[0], after, after  # peft cannot switch trained bias vectors off
    with model.disable_adapter():
        return trained[0], after, logits(model)


def _quick() -> dict[str, Any]:
    from support.runs import QUICK

    return dict(QUICK)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reloaded_adapter_gives_the_trained_logits_bit_for_bit(
    variant: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, after, base = _train_and_reload(tmp_path, tiny_base, VARIANTS[variant], monkeypatch)
    assert torch.equal(trained, after)
    assert not torch.allclose(after, base, atol=1e-4), "the adapter changes nothing"


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # peft's, on every loading
def test_adalora_shares_out_ranks_and_reloads(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"lora": None, "adalora": {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1}}
    trained, after, base = _train_and_reload(tmp_path, tiny_base, changes, monkeypatch)
    # Pruned ranks are left out of the file: the same function, summed in another order.
    torch.testing.assert_close(trained, after, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(after, base, atol=1e-4)
    pattern = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["rank_pattern"]
    ranks = [sum(mask) for mask in pattern.values()]
    assert sum(ranks) == 3 * len(ranks) < 6 * len(ranks)


@pytest.mark.parametrize("variant", CONVERTED)
def test_adapters_that_started_from_base_weights_are_saved_as_plain_lora(
    variant: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, after, base = _train_and_reload(tmp_path, tiny_base, CONVERTED[variant], monkeypatch)
    torch.testing.assert_close(trained, after, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, base, atol=1e-3)
    assert '"init_lora_weights": true' in (tmp_path / "run/adapter/adapter_config.json").read_text()


def test_bias_vectors_are_trained_and_saved_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.tiny import llama_config

    base = build_base(tmp_path / "base", config=llama_config(attention_bias=True))
    trained, after, _ = _train_and_reload(tmp_path, base, {"lora": {"bias": "lora_only"}}, monkeypatch)
    assert torch.equal(trained, after)


def test_fused_experts_are_adapted_by_target_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=264, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=None, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    base = build_base(tmp_path / "base", config=config)
    lora = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    trained, after, _ = _train_and_reload(tmp_path, base, {"lora": lora}, monkeypatch)
    assert torch.equal(trained, after)


def test_gpt2_is_adapted_through_its_transposed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=264, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=2, eos_token_id=2, pad_token_id=0
    )
    base = build_base(tmp_path / "base", config=config)
    trained, after, _ = _train_and_reload(tmp_path, base, {}, monkeypatch)
    assert torch.equal(trained, after)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "dora"])
def test_an_adapter_of_a_quantised_base_reloads_on_the_same_quantised_base(
    kind: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BitsAndBytesConfig

    four_bit = {"bnb_4bit_quant_type": "fp4" if kind == "fp4" else "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    quantization = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, **four_bit}
    changes: dict[str, Any] = {"quantization": quantization}
    if kind == "dora":
        changes["lora"] = {"use_dora": True}
    same = dict(quantization)
    if kind != "int8":
        same["bnb_4bit_use_double_quant"] = True
    trained, after, base = _train_and_reload(
        tmp_path, tiny_base, changes, monkeypatch, quantization_config=BitsAndBytesConfig(**same)
    )
    assert torch.equal(trained, after)
    assert not torch.allclose(after.float(), base.float(), atol=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_without_bfloat16_autocast_the_adapter_of_a_quantised_base_is_trained_in_float32(
    bf16: bool, tmp_path: Path, tiny_base: Path
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from lorafit.training.arguments import CHECKPOINTING
    from lorafit.training.trainer.peft_steps import PeftSteps

    class WithPeft(PeftSteps, SFTTrainer):
        """And nothing else of ours."""

    switches: dict[str, Any] = {"use_cpu": True, CHECKPOINTING: False, "report_to": "none", "bf16": bf16}
    arguments = SFTConfig(output_dir=str(tmp_path), **switches)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    trainer = WithPeft(
        loraplus_lr_ratio=None,
        model=get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )
    types = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert types == {torch.bfloat16 if bf16 else torch.float32}
