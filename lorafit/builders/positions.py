"""How many positions a base knows, by its config.json. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorafit.recipe import Recipe
from lorafit.recipe.advice import Advice
from lorafit.recipe.rules.broken import Broken
from lorafit.recipe.sections import TrainingSection

IN_A_TABLE = frozenset(
    ("biogpt", "codegen", "ctrl", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt", "opt")
)
"""Architectures that look positions up in a table: beyond its end they fail."""
WITHOUT = frozenset(("bloom", "mpt"))
"""Those that weigh by distance (ALiBi): a limit in their config limits nothing."""


@dataclass(frozen=True)
class Positions:
    """What a base knows of places in a text."""

    count: int
    is_a_limit: bool
    """Whether it fails beyond them; else it only has not seen them (rotary positions)."""


def positions(config: Mapping[str, Any]) -> Positions | None:
    """Of a base with this config.json; None where nothing limits it, or nothing is said."""
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, Mapping) else config
    kind = str(text.get("model_type", config.get("model_type")))
    count = next((text[name] for name in ("max_position_embeddings", "n_positions") if name in text), None)
    if type(count) is not int or count < 1 or kind in WITHOUT or text.get("alibi") is True:
        return None
    if kind in IN_A_TABLE:
        return Positions(count, True)
    return Positions(max(count, *_scaled(text, count)), False)


def _scaled(text: Mapping[str, Any], count: int) -> Iterator[int]:
    """Positions that a scaling of rotary ones reaches: `max_position_embeddings` counts it in some files only."""
    yield count
    for key in ("rope_scaling", "rope_parameters"):
        settings = text.get(key)
        if not isinstance(settings, Mapping):
            continue
        for one in (settings, *(value for value in settings.values() if isinstance(value, Mapping))):  # by layer type
            factor, original = one.get("factor"), one.get("original_max_position_embeddings", count)
            if isinstance(factor, int | float) and isinstance(original, int | float):
                yield int(factor * original)


def positions_exceeded(training: TrainingSection, known: Positions | None) -> Iterator[Broken]:
    """A length of rows that the base fails at."""
    if known is not None and known.is_a_limit and training.max_length > known.count:
        default = "" if "max_length" in training.model_fields_set else ", the default,"
        message = f"{training.max_length:,}{default} is more than the {known.count:,} positions of the base, beyond"
        yield Broken("training.max_length", f"{message} which it fails; write {known.count}")


def advise_on_positions(recipe: Recipe, known: Positions | None) -> Iterator[Advice]:
    """A length of rows that the base has never seen."""
    training = recipe.training
    if known is None or known.is_a_limit or training.max_length <= known.count or "positions" in recipe.silence:
        return
    default = "" if "max_length" in training.model_fields_set else ", the default,"
    message = f"{training.max_length:,}{default} is more than the {known.count:,} positions that the base was"
    message = f"{message} trained on, and rows beyond them are hard to learn; write {known.count}"
    yield Advice("positions", "training.max_length", message)
