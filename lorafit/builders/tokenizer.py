"""`model` section in, tokenizer out."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorafit.errors import ModelError
from lorafit.recipe.sections import ModelSection


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token. Raises ModelError."""
    tokenizer = AutoTokenizer.from_pretrained(
        section.model_name_or_path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        use_fast=True,
    )
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has no eos_token", where=section.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
