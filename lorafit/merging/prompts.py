"""What a merge is verified on: token sequences of the run's own rows, or random ones."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import datasets

from lorafit.builders.model_files import BaseModelFiles
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.data.prepare import prepare
from lorafit.errors import LorafitError
from lorafit.merging.adapter_files import Adapter

COUNT, LENGTH = 64, 64


@dataclass(frozen=True)
class Prompts:
    """Token sequences, and where they are from."""

    ids: tuple[tuple[int, ...], ...]
    source: str
    """`64 held-out rows`, `8 held-out rows, 24 training rows and 32 random sequences`."""


def prompts_for(adapter: Adapter, base_files: BaseModelFiles, *, cache_dir: Path | None) -> Prompts:
    """64 sequences of at most 64 tokens: held-out rows of the run, then its training rows, then random tokens.

    Random sequences are the same for every adapter of a vocabulary, and reach every layer and expert alike.
    """
    chosen: list[tuple[int, ...]] = []
    said, why_random = [], "the adapter carries no recipe"
    try:
        sides = _rows(adapter, base_files, cache_dir=cache_dir)
    except LorafitError as error:
        sides, why_random = {}, f"its rows cannot be read: {error.problems[0]}"
    for name, rows in sides.items():
        wanted = min(COUNT - len(chosen), len(rows))
        if wanted:
            spread = rows.select([index * len(rows) // wanted for index in range(wanted)])
            chosen += [tuple(ids[:LENGTH]) for ids in spread["input_ids"]]
            said.append(f"{wanted} {name} rows")
        why_random = "the run has no more rows"
    if missing := COUNT - len(chosen):
        tokens = random.Random(0)
        chosen += [tuple(tokens.randrange(base_files.vocab_size) for _ in range(32)) for _ in range(missing)]
        said.append(f"{missing} random token sequences ({why_random})")
    return Prompts(tuple(chosen), ", ".join(said))


def _rows(adapter: Adapter, base_files: BaseModelFiles, *, cache_dir: Path | None) -> dict[str, datasets.Dataset]:
    if adapter.recipe is None:
        return {}
    recipe = adapter.recipe.recipe
    data = prepare(
        recipe.data,
        tokenizer=load_tokenizer(adapter.base),
        max_length=recipe.training.max_length,
        seed=recipe.training.seed,
        stop_token_ids=base_files.stop_token_ids,
        vocab_size=base_files.vocab_size,
        cache_dir=cache_dir,
    )
    return {"training": data.train} if data.eval is None else {"held-out": data.eval, "training": data.train}
