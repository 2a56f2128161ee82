"""Whether the `lora` section of a recipe fits the modules of its base. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache

from lorafit.builders.modules import Modules
from lorafit.errors import Problem
from lorafit.recipe import Recipe
from lorafit.recipe.patterns import backtracks_for_ever
from lorafit.recipe.sections import LoraSection

Where = Callable[[str, str], Problem]

SMALLEST_MATRIX = 16
"""A side shorter than this is a gate of a few outputs (routers, shared experts), which no rank fits: where an
expression takes it along, it gets an adapter larger than itself, and nothing is lost by that."""


def adapter_misfits(recipe: Recipe, modules: Modules, where: Where) -> Iterator[Problem]:
    """What the recipe names and the base does not have, and ranks that its matrices cannot hold."""
    yield from names_without_match(recipe.lora, modules, where)
    yield from ranks_too_large(recipe, modules, where)


def names_without_match(lora: LoraSection, modules: Modules, where: Where) -> Iterator[Problem]:
    """One problem for each name in the section that no module or parameter of the model answers to.

    PEFT itself complains only when no target at all matches.
    """
    adaptable = list(modules.shapes)
    for key, value in (("target_modules", lora.target_modules), ("exclude_modules", lora.exclude_modules)):
        if isinstance(value, str) and value != "all-linear":
            if not any(_full_match(value, name) for name in modules.names):
                mend = _as_expression(value, modules) or _nearest(value, adaptable)
                yield where(f"lora.{key}", f"the expression {value!r} matches no module; {mend}")
        elif isinstance(value, tuple):
            candidates = adaptable if key == "target_modules" else modules.names
            yield from _missing(key, value, candidates=candidates, shown=adaptable, where=where)
    adapted = [*_adapted(lora, modules), *_adapted_parameters(lora, modules)]
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            if not any(_is_meant(pattern, name) for name in adapted):
                yield where(
                    f"lora.{key}", f"{pattern!r} matches no module with an adapter; {_nearest(pattern, adapted)}"
                )
    if lora.modules_to_save:
        names = modules.names
        yield from _missing("modules_to_save", lora.modules_to_save, candidates=names, shown=names, where=where)
    if lora.target_parameters:
        names = modules.parameters
        bare = [name for name in names if not name.endswith((".weight", ".bias"))]  # those of a fused mixture
        yield from _missing("target_parameters", lora.target_parameters, candidates=names, shown=bare, where=where)
    yield from _layers_out_of_range(lora, modules.names, where)
    yield from _tokens_out_of_range(lora, modules.rows, where)


def ranks_too_large(recipe: Recipe, modules: Modules, where: Where) -> Iterator[Problem]:
    """A rank above the shorter side of a matrix: the adapter would be larger than the matrix, and could do no more."""
    lora = recipe.lora
    general = {"adalora.init_r": recipe.adalora.init_r} if recipe.adalora else {"lora.r": lora.r}
    if "rank_sweep" in recipe.model_fields_set and recipe.rank_sweep.ranks:
        general["rank_sweep.ranks"] = max(recipe.rank_sweep.ranks)
    is_listed = not isinstance(lora.target_modules, str)
    small: dict[tuple[str, int], dict[str, int]] = {}
    fits = False
    for name in _adapted(lora, modules):
        side = min(modules.shapes[name])
        if side < SMALLEST_MATRIX and not is_listed:
            continue
        chosen = next((pattern for pattern in lora.rank_pattern if _is_meant(pattern, name)), None)
        ranks = general if chosen is None else {"lora.rank_pattern": lora.rank_pattern[chosen]}
        for key, rank in ranks.items():
            if rank > side:
                small.setdefault((key, rank), {})[name.rpartition(".")[2]] = side
            else:
                fits = True
    for (key, rank), sides in small.items():
        sizes = ", ".join(f"{name} ({side})" for name, side in sorted(sides.items()))
        patterns = ", ".join(f"{name}: {side}" for name, side in sorted(sides.items()))
        some = f", or lora.rank_pattern: {{{patterns}}}" if fits and key == "lora.r" else ""
        message = f"{rank} is more than the shorter side of {sizes}, an adapter larger than what it adapts"
        yield where(key, f"{message}; write at most {min(sides.values())}{some}")


def _adapted(lora: LoraSection, modules: Modules) -> Iterator[str]:
    """The modules that get an adapter, those of layers that `layers_to_transform` leaves out among them."""
    targets, excluded = lora.target_modules, lora.exclude_modules
    for name in modules.shapes:
        is_wanted = name not in modules.beside_layers if targets == "all-linear" else _is_named(targets, name)
        if is_wanted and not (excluded is not None and _is_named(excluded, name)):
            yield name


def _adapted_parameters(lora: LoraSection, modules: Modules) -> Iterator[str]:
    """Parameters with an adapter, and the modules that hold them: patterns may name either."""
    for name in modules.parameters:
        if lora.target_parameters and _is_named(lora.target_parameters, name):
            yield from (name, name.rpartition(".")[0])


def _is_named(value: str | tuple[str, ...], name: str) -> bool:
    """As PEFT matches: text is an expression for the whole name, a list holds its ends."""
    if isinstance(value, str):
        return _full_match(value, name)
    return any(name == one or name.endswith(f".{one}") for one in value)


def _is_meant(pattern: str, name: str) -> bool:
    """As PEFT matches the keys of `rank_pattern` and `alpha_pattern`."""
    return _full_match(rf"(.*\.)?({pattern})", name)


def _full_match(pattern: str, name: str) -> bool:
    compiled = _compiled(pattern)
    return compiled is not None and compiled.fullmatch(name) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str] | None:
    """None for what is no expression, or ends no match: the recipe's rules say so."""
    try:
        return None if backtracks_for_ever(pattern) else re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None


def _missing(
    key: str, names: tuple[str, ...], *, candidates: Iterable[str], shown: Iterable[str], where: Where
) -> Iterator[Problem]:
    for name in names:
        if not any(_is_named((name,), candidate) for candidate in candidates):
            yield where(f"lora.{key}", f"{name!r} matches nothing in this model; {_nearest(name, shown)}")


def _as_expression(text: str, modules: Modules) -> str | None:
    """The expression for whole names that was meant by one for their ends."""
    whole = rf".*\.({text})"
    return f"write '{whole}'" if any(_full_match(whole, name) for name in modules.shapes) else None


def _nearest(name: str, candidates: Iterable[str]) -> str:
    """The model's own names closest to `name`, or all of them when none is close."""
    suffixes = sorted({last for candidate in candidates if not (last := candidate.rpartition(".")[2]).isdecimal()})
    close = difflib.get_close_matches(name.rpartition(".")[2], suffixes, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(suffixes[:12]) or 'none'}"


def _layers_out_of_range(lora: LoraSection, modules: Iterable[str], where: Where) -> Iterator[Problem]:
    if lora.layers_to_transform is None:
        return
    wanted = lora.layers_to_transform if isinstance(lora.layers_to_transform, tuple) else (lora.layers_to_transform,)
    indices = [int(match[1]) for name in modules if (match := re.match(r".*?\.[^.]*\.(\d+)\.", name))]
    count = max(indices, default=-1) + 1
    for layer in wanted:
        if not 0 <= layer < count:
            yield where(
                "lora.layers_to_transform", f"layer {layer} does not exist; this model has layers 0 to {count - 1}"
            )


def _tokens_out_of_range(lora: LoraSection, rows: int, where: Where) -> Iterator[Problem]:
    indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = lora.trainable_token_indices
    if indices is None:
        return
    ids = indices if isinstance(indices, tuple) else tuple(id_ for ids in indices.values() for id_ in ids)
    for id_ in ids:
        if not 0 <= id_ < rows:
            yield where("lora.trainable_token_indices", f"token {id_} does not exist; ids run from 0 to {rows - 1}")
