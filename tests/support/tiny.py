"""Tiny base models with a tokenizer, built from nothing in a second; and rows to train them on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ChatML turns, distinct padding and end-of-turn tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL[1]]})
    tokenizer.chat_template = CHATML
    return tokenizer


def llama_config(**changes: Any) -> LlamaConfig:
    """Two layers of width 64: every shape a multiple of 64, so that it can be quantised, too."""
    settings = {
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(settings | changes))


def build_base(directory: Path, *, config: PretrainedConfig | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """A base model directory with seeded random weights and the byte tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or llama_config(), dtype=dtype)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def sums(count: int, *, first: int = 0) -> list[dict[str, str]]:
    """Prompt/completion rows with something to learn."""
    return [
        {"prompt": f"What is {i} + {i % 7}?", "completion": f"It is {i + i % 7}."} for i in range(first, first + count)
    ]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """`rows` as one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
