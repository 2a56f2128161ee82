"""A base model of the real one's architecture, shrunk to two layers with random weights: what `--smoke` trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from lorafit.builders.architectures import task_problems
from lorafit.builders.auto_class import auto_class
from lorafit.errors import ModelError
from lorafit.tasks import DEFAULT_TASK, Task

HIDDEN, HEAD = 128, 32  # widths are multiples of 64, the block size of 4-bit weights
SMALLER = {
    # width of the whole, of a head, of the feed-forward, by the names that architectures give them
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim", "embedding_size"), HIDDEN),
    **dict.fromkeys(("head_dim", "query_pre_attn_scalar", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), HEAD),
    "rotary_dim": HEAD // 2,
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 2 * HIDDEN),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    # mixtures of experts
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    # short enough that the first rows are longer
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 64),
}
"""Largest value of each size that stays; an attribute that the config does not have, or has as null, is left so."""


def write_smoke_base(
    config: PreTrainedConfig,
    tokenizer_dir: Path,
    *,
    out_dir: Path,
    layers: int = 2,
    trust_remote_code: bool = False,
    task: Task = DEFAULT_TASK,
) -> Path:
    """Write a model of `config`'s architecture, a few MB, with the tokenizer, and return `out_dir`.

    The weights are random, with a fixed seed. Raises ModelError for an architecture that is not for the task.
    """
    if problems := list(task_problems(config.to_dict(), where=str(config.name_or_path), task=task)):
        raise ModelError(problems)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=trust_remote_code)
    small = shrunken_config(config, tokenizer=tokenizer, layers=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_class(task.model).from_config(small, trust_remote_code=trust_remote_code)
    model.generation_config = GenerationConfig(eos_token_id=small.eos_token_id, pad_token_id=small.pad_token_id)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return out_dir


def shrunken_config(
    config: PreTrainedConfig, *, tokenizer: PreTrainedTokenizerBase, layers: int = 2
) -> PreTrainedConfig:
    """The same architecture, `layers` deep, at most 128 wide, with the tokenizer's vocabulary."""
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    for part in _parts(small):
        _shrink(part, layers=layers)
    text = small.get_text_config()
    text.vocab_size = -(-len(tokenizer) // 64) * 64
    for part in (small, text):
        for kind in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(part, kind, getattr(tokenizer, kind))
    return small


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config and, for models that see or hear too, the configs inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _shrink(config: PreTrainedConfig, *, layers: int) -> None:
    for name, largest in SMALLER.items():
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value > largest:
            setattr(config, name, largest)
    heads, groups = getattr(config, "num_attention_heads", 0), getattr(config, "num_key_value_heads", None)
    if heads:
        config.num_attention_heads = HIDDEN // HEAD
        if groups is not None:  # the kind stays: one group, as many as heads, or some in between
            config.num_key_value_heads = 1 if groups == 1 else HIDDEN // HEAD // (1 if groups == heads else 2)
    depth = getattr(config, "num_hidden_layers", 0)
    if depth > layers:
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == depth:
                setattr(config, name, _first_of_each(value, count=layers))
        config.num_hidden_layers = layers
        if getattr(config, "max_window_layers", 0):
            config.max_window_layers = min(config.max_window_layers, layers)
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, list) for value in rope.values()):  # factors for each dimension of the wider head
        scalars = {name: value for name, value in rope.items() if not isinstance(value, list)}
        config.rope_parameters = {**scalars, "rope_type": "default"}


def _first_of_each(values: list[Any], *, count: int) -> list[Any]:
    """`count` values that show as many different ones as fit, in the order they first come."""
    different = list(dict.fromkeys(values))[:count]
    return different + different[-1:] * (count - len(different))
