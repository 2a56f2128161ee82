"""Models of seeded random weights, rows for them, and how far apart two answers are."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

SMALL: dict[str, Any] = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def built(config: Any) -> PreTrainedModel:
    """A model of seeded random weights, in training mode, attention by sdpa where it may."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


def packed(*lengths: int) -> dict[str, Any]:
    """Documents of these lengths in one row, as the trainer's collator gives them."""
    torch.manual_seed(1)
    documents = [torch.randint(3, 264, (length,)).tolist() for length in lengths]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    return collate([{"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]} for ids in documents])


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, as a share of what was expected."""
    return ((got - expected).norm() / expected.norm().clamp(min=1e-6)).item()
