"""The tokens of `model.add_tokens`: their ids, and the pieces they were cut into before. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from lorafit.builders.model_files import AddedTokens
from lorafit.errors import ModelError


def add_to(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Give `tokenizer` each of `tokens` that it does not have as one id.

    Ordinary tokens, not special ones: a call or a tag that a model writes is part of its answer, and stays in it when
    special tokens are left out.
    """
    missing = [token for token in tokens if not is_one(tokenizer, token)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in missing])


def added_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], *, rows: int) -> AddedTokens:
    """What adding `tokens` to the base's own `tokenizer` comes to; `tokenizer` has them afterwards.

    Raises ModelError for a tokenizer without a fast version.
    """
    if not tokenizer.is_fast:
        message = f"{type(tokenizer).__name__} has no fast version (tokenizer.json), which model.add_tokens needs"
        raise ModelError(
            f"{message}: convert it with `AutoTokenizer.from_pretrained(...).save_pretrained(...)`",
            where=tokenizer.name_or_path,
        )
    known = frozenset(token for token in tokens if is_one(tokenizer, token))
    reserved = reserved_ids(tokenizer, rows=rows)
    without = _without(tokenizer, tokens)
    add_to(tokenizer, tokens)
    ids = {token: cast(int, tokenizer.convert_tokens_to_ids(token)) for token in tokens}  # a list for a list
    unusable = {*ids.values(), tokenizer.unk_token_id}
    cut = {token: without.encode(token, add_special_tokens=False).ids for token in tokens}
    pieces = {token: tuple(id_ for id_ in cut[token] if id_ not in unusable and id_ < rows) for token in tokens}
    return AddedTokens(ids, pieces, known, reserved, rows)


def reserved_ids(tokenizer: PreTrainedTokenizerBase, *, rows: int) -> tuple[int, ...]:
    """Ids below `rows` that ordinary text never has: of added tokens, special or not, and those that no token has."""
    return tuple(sorted({id_ for id_ in tokenizer.added_tokens_decoder if id_ < rows} | {*range(len(tokenizer), rows)}))


def is_one(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether `token` is one token by its own name."""
    return tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]


def _without(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer's core, to which `tokens` are text like any other."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = [one for one in core["added_tokens"] if one["content"] not in tokens]
    core["truncation"] = core["padding"] = None
    return Tokenizer.from_str(json.dumps(core))
