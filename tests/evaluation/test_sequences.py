"""The loss of each held-out sequence: equal to the plain one, whatever the batch and the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig

from lorafit.tasks import sequences
from lorafit.tasks.sequences import batches_by_length, sequence_losses
from support.tiny import llama_config

SMALL: dict[str, Any] = {"vocab_size": 264, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
WIDTHS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: llama_config(),
    "gpt2": lambda: GPT2Config(**SMALL, n_embd=32, n_layer=1, n_head=2),
    "gemma2, which caps its logits": lambda: Gemma2Config(
        **SMALL, **WIDTHS, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05
    ),
    "granite, which scales its logits": lambda: GraniteConfig(
        **SMALL, **WIDTHS, num_key_value_heads=1, logits_scaling=4.0
    ),
}


def some_rows(count: int = 9) -> datasets.Dataset:
    """Sequences of 5 to 40 tokens, the first half of each a prompt."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, 264, size=int(random.integers(5, 40))).tolist() for _ in range(count)]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


@torch.no_grad()
def plain_losses(model: nn.Module, rows: datasets.Dataset) -> tuple[list[float], list[int], list[int]]:
    """One row at a time, from the model's whole logits."""
    nll, tokens, correct = [], [], []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        targets = torch.tensor(row["labels"][1:])
        nll.append(float(nn.functional.cross_entropy(logits, targets, reduction="sum")))
        tokens.append(int((targets != -100).sum()))
        correct.append(int((logits.argmax(-1) == targets).sum()))
    return nll, tokens, correct


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_sequence_has_the_loss_it_has_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()
    rows = some_rows()
    losses = sequence_losses(model, rows, pad_token_id=0, batch_tokens=100)
    nll, tokens, correct = plain_losses(model, rows)
    np.testing.assert_allclose(losses.nll, nll, rtol=1e-5)
    assert losses.tokens.tolist() == tokens
    assert losses.correct.tolist() == correct
    assert losses.loss == pytest.approx(sum(nll) / sum(tokens))


def test_the_logits_are_made_a_few_at_a_time_and_only_where_tokens_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(llama_config()).eval()
    rows = some_rows()
    whole = sequence_losses(model, rows, pad_token_id=0)
    monkeypatch.setattr(sequences, "LOGITS_AT_ONCE", 3 * 264)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.shape[-2]))
    parts = sequence_losses(model, rows, pad_token_id=0)
    np.testing.assert_allclose(parts.nll, whole.nll, rtol=1e-6)
    assert seen[:3] == [8, 8, 1]  # the probe, twice, and one token to learn the size of the vocabulary
    assert max(seen[3:]) == 3
    assert sum(seen[3:]) == whole.tokens.sum()


def test_the_adapter_counts_and_the_mode_of_the_model_stays() -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(llama_config())
    rows = some_rows()
    without = sequence_losses(base, rows, pad_token_id=0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).train()
    assert abs(sequence_losses(model, rows, pad_token_id=0).loss - without.loss) > 1e-4
    assert model.training
    with model.disable_adapter():
        assert sequence_losses(model, rows, pad_token_id=0).nll.tolist() == without.nll.tolist()


def test_batches_hold_every_row_once_and_no_more_than_asked_for() -> None:
    lengths = [5, 90, 7, 7, 300, 8, 40]
    batches = list(batches_by_length(lengths, batch_tokens=100))
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert batches[0] == [4]  # alone longer than allowed
    assert all(len(batch) * max(lengths[row] for row in batch) <= 100 for batch in batches[1:])


def test_the_losses_equal_those_of_training(tmp_path: Path, tiny_base: Path) -> None:
    from lorafit.training.inputs import read_inputs
    from support.runs import reloaded, run, small_recipe

    loaded = small_recipe(tmp_path, tiny_base)
    result, _ = run(loaded)
    data = next(part for part in _parts(read_inputs(loaded, cache_dir=None)) if hasattr(part, "audit"))
    losses = sequence_losses(reloaded(result, tiny_base), data.eval, pad_token_id=0)
    assert losses.loss == pytest.approx(result.eval_loss_after, rel=1e-5)


def _parts(inputs: Any) -> list[Any]:
    return list(inputs) if isinstance(inputs, tuple) else list(vars(inputs).values())
