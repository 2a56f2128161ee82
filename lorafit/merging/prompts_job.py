"""The token sequences of `prompts.prompts_for`: what runs in a process of its own. No torch."""

from __future__ import annotations

import random

import datasets

from lorafit.builders.tokenizer import load_tokenizer
from lorafit.data.prepare import prepare
from lorafit.errors import LorafitError
from lorafit.merging.verification_prompts import PromptsJob

COUNT, LENGTH = 64, 64


def choose(job: PromptsJob) -> tuple[list[list[int]], str]:
    """The sequences, and where they are from.

    Random ones are the same for every adapter of a vocabulary, and reach every layer and expert alike.
    """
    chosen: list[list[int]] = []
    said, why_random = [], "the adapter carries no recipe"
    try:
        sides = _rows(job)
    except LorafitError as error:
        sides, why_random = {}, f"its rows cannot be read: {error.problems[0]}"
    for name, rows in sides.items():
        wanted = min(COUNT - len(chosen), len(rows))
        if wanted:
            spread = rows.select([index * len(rows) // wanted for index in range(wanted)])
            chosen += [ids[:LENGTH] for ids in spread["input_ids"]]
            said.append(f"{wanted} {name} rows")
        why_random = "the run has no more rows"
    if missing := COUNT - len(chosen):
        tokens = random.Random(0)
        chosen += [[tokens.randrange(job.vocab_size) for _ in range(32)] for _ in range(missing)]
        said.append(f"{missing} random token sequences ({why_random})")
    return chosen, ", ".join(said)


def _rows(job: PromptsJob) -> dict[str, datasets.Dataset]:
    recipe = job.recipe
    if recipe is None:
        return {}
    data = prepare(
        recipe.data,
        task=recipe.task,
        tokenizer=load_tokenizer(job.base, stop_token=recipe.data.stop_token),
        max_length=recipe.training.max_length,
        seed=recipe.training.seed,
        stop_token_ids=job.stop_token_ids,
        vocab_size=job.vocab_size,
        cache_dir=job.cache_dir,
    )
    return {"training": data.train} if data.eval is None else {"held-out": data.eval, "training": data.train}
