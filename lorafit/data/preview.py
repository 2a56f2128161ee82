"""The first rows as the model will see them: every token, whether it is trained, and where generation stops."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from lorafit.builders.library_config import embedding_rows
from lorafit.builders.model_files import model_directory, read_config, stop_token_ids
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.data.audit import Audit
from lorafit.data.prepare import PreparedData, prepare
from lorafit.data.tokens import NOT_TRAINED
from lorafit.recipe.recipe import Recipe

MOST_BYTES_OF_A_CHARACTER = 4


@dataclass(frozen=True)
class TokenView:
    """One token, or the few that only together spell a character."""

    text: str
    ids: tuple[int, ...]
    is_trained: bool
    is_stop: bool


@dataclass(frozen=True)
class RowView:
    """One sequence and where it came from."""

    where: str
    side: str
    tokens: tuple[TokenView, ...]


@dataclass(frozen=True)
class Preview:
    """What `lorafit preview` shows."""

    rows: tuple[RowView, ...]
    stop_tokens: tuple[str, ...]
    """What generation stops on."""
    audit: Audit

    def as_dict(self) -> dict[str, Any]:
        """The result for scripts."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "stop_tokens": list(self.stop_tokens),
            "audit": self.audit.as_dict(),
            "summary": self.audit.summary(),
            "warnings": list(self.audit.warnings),
        }


def recipe_preview(recipe: Recipe, *, rows: int, cache_dir: Path | None, show_progress: bool = False) -> Preview:
    """The preview of a recipe's data, from the base model's settings and tokenizer alone: no weight is needed.

    Raises DataError and ModelError.
    """
    return prepared_preview(recipe, rows=rows, cache_dir=cache_dir, show_progress=show_progress)[1]


def prepared_preview(
    recipe: Recipe, *, rows: int, cache_dir: Path | None, show_progress: bool = False
) -> tuple[str, Preview]:
    """The same, after the fingerprint of the prepared data."""
    directory = model_directory(recipe.model)
    config = read_config(directory)
    tokenizer = load_tokenizer(recipe.model, stop_token=recipe.data.stop_token)
    stops = stop_token_ids(directory, config=config)
    if recipe.data.stop_token is not None:
        stops |= {int(tokenizer.eos_token_id)}
    vocab_size = embedding_rows(recipe.model, directory=directory, config=config)
    added = [cast(int, tokenizer.convert_tokens_to_ids(token)) + 1 for token in recipe.model.add_tokens]
    data = prepare(
        recipe.data,
        task=recipe.task,
        tokenizer=tokenizer,
        max_length=recipe.training.max_length,
        seed=recipe.training.seed,
        stop_token_ids=stops,
        vocab_size=max(vocab_size, *added, 0),
        cache_dir=cache_dir,
        show_progress=show_progress,
    )
    return data.fingerprint, preview(data, tokenizer, stop_token_ids=stops, rows=rows)


def preview(
    data: PreparedData, tokenizer: PreTrainedTokenizerBase, *, stop_token_ids: frozenset[int], rows: int
) -> Preview:
    """The first `rows` sequences of each side."""
    sides = [("train", data.train)] + ([("eval", data.eval)] if data.eval else [])
    views = [
        RowView(
            where=f"{data.files[row['file']]}:{row['line']}",
            side=side,
            tokens=token_views(row["input_ids"], row["labels"], tokenizer, stop_token_ids),
        )
        for side, table in sides
        for row in table.select(range(min(rows, len(table))))
    ]
    return Preview(tuple(views), tuple(str(tokenizer.decode([stop])) for stop in sorted(stop_token_ids)), data.audit)


def token_views(
    ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]
) -> tuple[TokenView, ...]:
    """The tokens with their text. Tokens that hold part of a character are shown with the rest of it."""
    views = []
    start = 0
    for end in range(1, len(ids) + 1):
        is_trained = labels[start] != NOT_TRAINED
        text = _text(ids[max(0, start - 1) : end], start > 0, tokenizer)
        is_part = text.endswith("\ufffd") and end - start < MOST_BYTES_OF_A_CHARACTER and end < len(ids)
        if is_part and (labels[end] != NOT_TRAINED) == is_trained:
            continue
        group = tuple(ids[start:end])
        views.append(TokenView(text, group, is_trained, is_trained and not stop_token_ids.isdisjoint(group)))
        start = end
    return tuple(views)


def _text(ids: list[int], has_before: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokens add to the one before them: alone, some tokenizers drop the space a token begins with."""
    whole = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if not has_before:
        return whole
    before = str(tokenizer.decode(ids[:1], clean_up_tokenization_spaces=False))
    return whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(ids[1:]))
