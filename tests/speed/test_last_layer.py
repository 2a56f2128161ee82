"""The last layer computes the trained positions alone, and gives what it gave; or stands back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from lorafit.builders.adapter import base_of
from lorafit.speed.last_layer import parts_of_last_layer, use_last_layer, why_not
from support.models import HEADS, SMALL, built
from support.runs import run, small_recipe
from support.tiny import llama_config

EAGER: dict[str, Any] = {"attn_implementation": "eager"}
CONFIGS = {
    "llama": llama_config(),
    "qwen3": Qwen3Config(**SMALL, **HEADS),
    "gemma2": Gemma2Config(**SMALL, **HEADS, **EAGER),
    "sliding window": MistralConfig(**SMALL, **HEADS, sliding_window=6),
    "gpt2": GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "experts": Qwen3MoeConfig(**SMALL, **HEADS, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
}


def with_head(config: Any) -> PreTrainedModel:
    """A model of seeded random weights with TRL's head, in training mode."""
    model = built(config)
    add_fused_lm_head(model)
    return model


def batch(*, packed: bool) -> dict[str, Any]:
    """Three documents, the latter half of each trained, in one row or padded to the longest."""
    torch.manual_seed(1)
    rows = []
    for length in (20, 3, 11):
        ids = torch.randint(3, 264, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return dict(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)(rows))


def step(model: PreTrainedModel | PeftModel, rows: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The loss, and the gradient of everything by its name."""
    model.zero_grad()
    loss = model(**rows, use_cache=False, fused_lm_head=True).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach()} | {name: gradient.clone() for name, gradient in gradients.items()}


def counted(model: PreTrainedModel) -> list[int]:
    """Positions that the last layer's MLP is about to see, from now on."""
    seen: list[int] = []
    first = next(child for child in parts_of_last_layer(model)[-1].children() if not isinstance(child, nn.Dropout))
    first.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape[:-1].numel()))
    return seen


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_whole_layer(name: str, packed: bool, recomputed: bool) -> None:
    model = with_head(copy.deepcopy(CONFIGS[name]))
    if recomputed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = batch(packed=packed)
    expected = step(model, rows)
    assert why_not(model, dtype=torch.float32) is None
    use_last_layer(model)
    seen = counted(model)
    got = step(model, rows)
    trained = int((rows["labels"][:, 1:] != -100).sum())
    assert set(seen) == {trained} and trained < rows["labels"].numel()
    assert got.keys() == expected.keys()
    assert len(got) > 10
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-3, atol=1e-6)


def test_it_is_put_on_again_by_each_trainer_of_a_model_without_harm() -> None:
    model, rows = with_head(llama_config()), batch(packed=True)
    expected = step(model, rows)
    for _ in range(3):
        use_last_layer(model)
    got = step(model, rows)
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-3, atol=1e-6)


def test_evaluation_other_calls_and_generation_see_every_position() -> None:
    model, rows = with_head(llama_config()), batch(packed=True)
    prompt = rows["input_ids"][:, :9]
    writer: Any = model
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}

    def others() -> list[torch.Tensor]:
        with torch.no_grad():
            logits = model.train()(**rows, use_cache=False).logits
            model.eval()
            losses = model(**rows, use_cache=False, fused_lm_head=True).log_probs
            return [logits, losses, writer.generate(prompt, **settings)]

    before = others()
    use_last_layer(model)
    step(model.train(), rows)
    for expected, got in zip(before, others(), strict=True):
        assert torch.equal(expected, got)


def test_a_batch_without_a_trained_position_gives_zero_gradients() -> None:
    model = get_peft_model(with_head(llama_config()), LoraConfig(target_modules="all-linear"))
    use_last_layer(base_of(model))
    rows = batch(packed=True)
    rows["labels"] = torch.full_like(rows["labels"], -100)
    got = step(model, rows)
    assert len(got) == 1 + 28
    assert not any(tensor.any() for tensor in got.values())


class _Mean(nn.Module):
    """Positions that see each other."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Each is the mean of all."""
        return states.mean(dim=1, keepdim=True).expand_as(states)


def test_a_layer_whose_positions_see_each_other_stays_whole() -> None:
    model = with_head(llama_config())
    model.model.layers[-1].mlp = _Mean()
    reason = why_not(model, dtype=torch.float32)
    assert reason is not None
    assert reason.startswith("its states differ by")


def test_layers_that_drop_out_and_those_of_other_parts_stay_whole() -> None:
    dropping = with_head(GPT2Config(vocab_size=264, n_embd=64, n_layer=2, n_head=4))
    assert why_not(dropping, dtype=torch.float32) == "dropout would draw other numbers"
    other = with_head(llama_config())
    other.model.layers = nn.ModuleList()
    assert why_not(other, dtype=torch.float32) == "the last layer has no q_proj, o_proj or mlp"


@pytest.mark.parametrize("is_on", [True, False])
def test_a_run_says_whether_it_computes_the_whole_layer(is_on: bool, tmp_path: Path, tiny_base: Path) -> None:
    _, said = run(small_recipe(tmp_path, tiny_base, training={"bf16": False}, speed={"last_layer": is_on}))
    assert ("last layer for trained positions on" in said) == is_on
