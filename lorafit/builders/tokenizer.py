"""`model` section in, tokenizer out."""

from __future__ import annotations

import difflib
import logging
from typing import cast

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from lorafit.builders.added_tokens import add_to, is_one
from lorafit.builders.library_config import embedding_rows
from lorafit.builders.model_files import model_directory, read_config
from lorafit.builders.tokenizer_files import read_tokenizer
from lorafit.errors import ModelError
from lorafit.recipe.sections import ModelSection

logger = logging.getLogger(__name__)

PADDING_NAMES = (
    *("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|reserved_special_token_0|>"),
    *("<unk>", "[UNK]", "<|unk|>"),
)
"""Tokens that no text contains, in the order they are taken for padding where the tokenizer names none."""


def load_tokenizer(section: ModelSection, *, stop_token: str | None = None) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with the tokens of `model.add_tokens` and one for padding. Raises ModelError.

    `stop_token` takes the place of its end-of-text token.

    Padding is the tokenizer's own choice, else the first of PADDING_NAMES that it has, else the end-of-text token
    (logged): padded positions are masked by position, so that costs nothing in training.
    """
    directory = model_directory(section)
    tokenizer = read_tokenizer(directory, trust_remote_code=section.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            'the tokenizer has no end-of-text token: write "eos_token": "..." in tokenizer_config.json',
            where=str(directory),
        )
    vocab_size = embedding_rows(section, directory=directory, config=read_config(directory))
    add_to(tokenizer, section.add_tokens)
    if stop_token is not None:
        _end_with(tokenizer, stop_token)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _padding_token(tokenizer, vocab_size=vocab_size)
        if tokenizer.pad_token == tokenizer.eos_token:
            logger.warning("%s: has no padding token; padding with %s", directory, tokenizer.eos_token)
    if getattr(tokenizer.backend_tokenizer, "fix_mistral_regex", None) is False:  # set where transformers warns of it
        logger.warning(
            "%s: its tokenizer.json splits text otherwise than the Mistral model was trained with; repair it with "
            "`AutoTokenizer.from_pretrained(DIRECTORY, fix_mistral_regex=True).save_pretrained(DIRECTORY)`",
            directory,
        )
    added = [cast(int, tokenizer.convert_tokens_to_ids(token)) + 1 for token in section.add_tokens]
    _refuse_foreign(tokenizer, vocab_size=max(vocab_size, *added, 0), where=str(directory))
    return tokenizer


def _end_with(tokenizer: PreTrainedTokenizerBase, stop_token: str) -> None:
    """Make `stop_token` the token that ends texts. Raises ModelError where it is not one token."""
    if not is_one(tokenizer, stop_token):
        known = [token.content for token in tokenizer.added_tokens_decoder.values()]
        near = difflib.get_close_matches(stop_token, known, n=1)
        mend = f"did you mean {near[0]}?" if near else "name one of its tokens, or add it with model.add_tokens"
        count = len(tokenizer.encode(stop_token, add_special_tokens=False))
        raise ModelError(f'"{stop_token}" is {count} tokens of the tokenizer, not one; {mend}', where="data.stop_token")
    tokenizer.add_special_tokens({"eos_token": AddedToken(stop_token, normalized=False, special=True)})


def _padding_token(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> str:
    known = tokenizer.get_vocab()
    names = [name for name in PADDING_NAMES if known.get(name, vocab_size) < vocab_size and name != tokenizer.eos_token]
    return names[0] if names else tokenizer.eos_token


def _refuse_foreign(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, where: str) -> None:
    """Ids must have a row in the embedding. Tokens added on top may lie outside (Gemma 3 ships one); the audit of the
    data names the rows that use them."""
    outside = {
        f"{kind} {token!r} is id {tokenizer.convert_tokens_to_ids(token)}"
        for kind, token in (
            ("bos_token", tokenizer.bos_token),
            ("eos_token", tokenizer.eos_token),
            ("pad_token", tokenizer.pad_token),
        )
        if token is not None and cast(int, tokenizer.convert_tokens_to_ids(token)) >= vocab_size
    }
    if tokenizer.vocab_size > vocab_size:
        outside.add(f"it has {tokenizer.vocab_size:,} tokens")
    if outside:
        raise ModelError(
            f"the tokenizer is not this model's: {', '.join(sorted(outside))}, the embedding has {vocab_size:,} rows; "
            "copy the model's own tokenizer there",
            where=where,
        )
