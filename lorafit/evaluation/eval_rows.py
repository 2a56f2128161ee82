"""What a model is measured on: sequences with the run's masks, and the questions in them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lorafit.builders.model_files import BaseModelFiles
from lorafit.data.prepare import PreparedData, prepare
from lorafit.data.tokens import NOT_TRAINED
from lorafit.errors import DataError
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.sections import DataSection, Source


@dataclass(frozen=True)
class Rows:
    """Sequences, and what is known of each."""

    table: datasets.Dataset
    """Columns `input_ids` and `labels`."""
    where: tuple[str, ...]
    """`file:line` of each; of a file on disk its name, without the directories of this machine."""
    text_bytes: npt.NDArray[np.int64]
    """[S] UTF-8 bytes of the trained text, special tokens left out."""
    files: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """The last answer of a row, and all that stands before it."""

    where: str
    prompt: tuple[int, ...]
    """Tokens up to where the answer begins, as they were trained."""
    reference: str
    """The answer, without stop token and white space around it."""


class RowReader:
    """Makes tokens and labels as the run did: with its tokenizer, template, masks and lengths."""

    def __init__(
        self, recipe: Recipe, base_files: BaseModelFiles, tokenizer: PreTrainedTokenizerBase, *, cache_dir: Path | None
    ) -> None:
        self._recipe, self._base_files, self._tokenizer, self._cache_dir = recipe, base_files, tokenizer, cache_dir

    def held_out(self, *, answers_only: bool = False) -> Rows:
        """The held-out rows; `answers_only` masks all but the answers, whatever was trained on. Raises DataError."""
        masks = answers_only and self._recipe.data.train_on == "all"
        data = self._recipe.data.model_copy(update={"train_on": "answers"} if masks else {})
        if data.eval:
            prepared = self._prepared(data.model_copy(update={"train": data.eval, "eval": ()}), is_held_out=True)
            return self._rows(prepared.train, prepared)
        if data.eval_fraction is None:
            raise DataError(
                "holds no held-out rows: name some with --data FILE, or --set 'data.eval=[{path: FILE}]'",
                where="data.eval",
            )
        prepared = self._prepared(data)
        return self._rows(prepared.eval, prepared)

    def split_fingerprint(self) -> str | None:
        """Of the rows that `eval_fraction` split: with another one, rows may be held out that were trained on."""
        if self._recipe.data.eval or self._recipe.data.eval_fraction is None:
            return None
        return self._prepared(self._recipe.data).fingerprint

    def general(self, sources: tuple[Source, ...]) -> Rows:
        """General text; what is longer than `training.max_length` is cut, since no answer is lost with it."""
        changes = {"train": sources, "eval": (), "eval_fraction": None, "over_length": "truncate"}
        prepared = self._prepared(self._recipe.data.model_copy(update=changes), is_held_out=True)
        return self._rows(prepared.train, prepared)

    def questions(self, rows: Rows, *, stop_token_ids: Collection[int]) -> tuple[Question, ...]:
        """One of each row that has a prompt before its last answer."""
        found = (
            _question(ids, labels, where, self._text, stop_token_ids=stop_token_ids)
            for ids, labels, where in zip(rows.table["input_ids"], rows.table["labels"], rows.where, strict=True)
        )
        return tuple(question for question in found if question is not None)

    def _prepared(self, section: DataSection, *, is_held_out: bool = False) -> PreparedData:
        return prepare(
            section,
            task=self._recipe.task,
            tokenizer=self._tokenizer,
            max_length=self._recipe.training.max_length,
            seed=self._recipe.training.seed,
            stop_token_ids=self._base_files.stop_token_ids,
            vocab_size=self._base_files.vocab_size,
            cache_dir=self._cache_dir,
            is_held_out=is_held_out,
        )

    def _rows(self, table: datasets.Dataset | None, prepared: PreparedData) -> Rows:
        if not table:
            raise DataError("holds no rows to measure on: name others with --data FILE", where="data.eval")
        files = [Path(file).name if Path(file).is_absolute() else file for file in prepared.files]
        where = [f"{files[file]}:{line}" for file, line in zip(table["file"], table["line"], strict=True)]
        trained = [
            [token for token, label in zip(ids, labels, strict=True) if label != NOT_TRAINED]
            for ids, labels in zip(table["input_ids"], table["labels"], strict=True)
        ]
        sizes = [len(self._text(ids).encode()) for ids in trained]
        return Rows(table, tuple(where), np.array(sizes, np.int64), tuple(files), prepared.audit.warnings)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _question(
    ids: list[int],
    labels: list[int],
    where: str,
    text: Callable[[list[int]], str],
    *,
    stop_token_ids: Collection[int],
) -> Question | None:
    end = len(labels)
    while end and labels[end - 1] == NOT_TRAINED:
        end -= 1
    start = end
    while start and labels[start - 1] != NOT_TRAINED:
        start -= 1
    if not start:
        return None
    return Question(where, tuple(ids[:start]), text(before_stop(ids[start:end], stop_token_ids)).strip())


def before_stop(ids: list[int], stop_token_ids: Collection[int]) -> list[int]:
    """The tokens up to the first that generation stops on."""
    return ids[: next((index for index, token in enumerate(ids) if token in stop_token_ids), len(ids))]
