"""How many rows a run reads and how long they are, from the files and, on some of them, the tokenizer."""

from __future__ import annotations

import random
from statistics import fmean

from lorafit.builders.model_files import is_on_hub
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.data import scan
from lorafit.data.prepare import prepare
from lorafit.errors import LorafitError
from lorafit.planning.plan_result import RowsOfRun
from lorafit.recipe import Recipe

COUNTED_ON = 500
"""Rows of each source that are made into tokens: the mean of as many is right to some per cent."""


def rows_of_run(recipe: Recipe, *, has_model: bool) -> RowsOfRun | None:
    """The training rows of one epoch; None where they cannot be read here. A Hub data set is not downloaded for it.

    `has_model`: whether the tokenizer is that of the recipe, and not of a shape that stands in for its model.
    """
    try:
        data = scan(recipe.data, seed=recipe.training.seed)
    except LorafitError:
        return None
    if data.skipped_hub:
        return None
    lengths = _lengths(recipe) if has_model else []
    if not lengths:
        return RowsOfRun(data.train_rows, None, None, 0)
    size = recipe.training.per_device_train_batch_size
    drawn = random.Random(0)
    batches = [max(drawn.choices(lengths, k=size)) for _ in range(COUNTED_ON)]
    return RowsOfRun(data.train_rows, fmean(lengths), fmean(batches), len(lengths))


def _lengths(recipe: Recipe) -> list[int]:
    """Tokens of the first rows of each source; none where the tokenizer is not on this machine, or refuses them."""
    section = recipe.model
    if is_on_hub(section):
        section = section.model_copy(update={"extra": {**section.extra, "local_files_only": True}})
    few = tuple(
        source.model_copy(update={"limit": min(COUNTED_ON, source.limit or COUNTED_ON), "weight": 1.0})
        for source in recipe.data.train
    )
    data = recipe.data.model_copy(
        update={"train": few, "eval": (), "eval_fraction": None, "over_length": "truncate", "max_lost_rows": 1.0}
    )
    try:
        tokenizer = load_tokenizer(section)
        rows = prepare(
            data,
            task=recipe.task,
            tokenizer=tokenizer,
            max_length=recipe.training.max_length,
            seed=recipe.training.seed,
            stop_token_ids=frozenset([tokenizer.eos_token_id]),
            vocab_size=len(tokenizer),
            cache_dir=None,
        )
    except (LorafitError, OSError):
        return []
    return [len(ids) for ids in rows.train["input_ids"]]
