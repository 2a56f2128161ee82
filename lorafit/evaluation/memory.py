"""How much is computed at a time, so that memory stays that of one model."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

SHARE = 0.03
"""Of the weights: what activations or cached keys and values may take beside them."""

SHARE_OF_FREE = 0.4
"""Of a GPU's free memory, which nothing else needs meanwhile: the rest is for what a batch makes beside it."""

AT_LEAST = 32 * 2**20
"""Bytes of them that a small model may take all the same: less would be a row at a time."""


def scoring_tokens(model: PreTrainedModel) -> int:
    """Tokens of one forward pass without a cache: the activations of one layer are there at a time."""
    config = model.config.get_text_config()
    hidden = config.hidden_size
    # What a layer holds at its widest: residual, norm and attention, the two or three of the MLP; LoRA copies its
    # inputs and outputs to its own type, which is float32 mostly.
    values = 8 * hidden + 4 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    return max(1, _budget(model) // (values * max(model.dtype.itemsize, 3)))


def generated_tokens(model: PreTrainedModel) -> int:
    """Tokens, prompts included, whose keys and values the cache may hold."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    # A step that grows the cache of a layer has it twice for a moment.
    per_token = 2 * groups * width * (config.num_hidden_layers + 1) * model.dtype.itemsize
    return max(1, _budget(model) // per_token)


def _budget(model: PreTrainedModel) -> int:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    is_on_gpu = next(model.parameters()).is_cuda
    free = int(SHARE_OF_FREE * torch.cuda.mem_get_info()[0]) if is_on_gpu else 0
    return max(AT_LEAST, int(SHARE * weights), free)
