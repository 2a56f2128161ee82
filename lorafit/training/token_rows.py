"""The rows of the tokens that the data use: those that would be trained for nothing, and those that never were."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

import datasets
import numpy as np
import numpy.typing as npt

from lorafit.builders.added_tokens import reserved_ids
from lorafit.builders.model_files import AddedTokens
from lorafit.builders.untrained_rows import never_trained, rows_on_disk
from lorafit.errors import ModelError, RecipeError
from lorafit.recipe import LoadedRecipe, Recipe
from lorafit.recipe.rules.tokens import rows_of_added_tokens_can_be_trained
from lorafit.recipe.sections import LoraSection
from lorafit.training.inputs import Inputs


def tokens_line(added: AddedTokens) -> str:
    """For people: the ids of `model.add_tokens`, and where their rows are."""
    ids = ", ".join(f"{token} is {id_}" for token, id_ in added.ids.items())
    grows = f"the embedding grows from {added.rows:,} to {added.rows_needed:,} rows"
    place = grows if added.rows_needed > added.rows else f"the embedding's {added.rows:,} rows have room"
    known = [token for token in added.ids if token in added.known]
    there = f"; of the base already: {', '.join(known)}" if known else ""
    return f"trained tokens: {ids}; {place}{there}"


def check_token_rows(loaded: LoadedRecipe, inputs: Inputs) -> Iterator[str]:
    """A warning for each that is allowed but likely unwanted.

    Raises RecipeError where no row has a token of `model.add_tokens`, ModelError where answers end with a token that
    the model could never write.
    """
    used = used_ids(inputs.data.train, vocab_size=inputs.base_files.vocab_size)
    yield from _unused(loaded, inputs, used)
    yield from _untrained(loaded, inputs, used)


def used_tokens(recipe: Recipe, inputs: Inputs, used: npt.NDArray[np.bool_] | None = None) -> tuple[str, ...]:
    """Those of `model.add_tokens` that any training row has."""
    if used is None:
        used = used_ids(inputs.data.train, vocab_size=inputs.base_files.vocab_size)
    return tuple(token for token in recipe.model.add_tokens if used[inputs.tokenizer.convert_tokens_to_ids(token)])


def used_ids(rows: datasets.Dataset, *, vocab_size: int) -> npt.NDArray[np.bool_]:
    """[vocab_size] whether any row holds the id."""
    used = np.zeros(vocab_size, np.bool_)
    for chunk in rows.data.column("input_ids").chunks:
        used[chunk.flatten().to_numpy()] = True
    return used


def _unused(loaded: LoadedRecipe, inputs: Inputs, used: npt.NDArray[np.bool_]) -> Iterator[str]:
    tokens = loaded.recipe.model.add_tokens
    unused = [token for token in tokens if token not in used_tokens(loaded.recipe, inputs, used)]
    if tokens and len(unused) == len(tokens):
        message = f"no training row has {_listed(tokens)}: their rows would learn nothing; write them into the rows"
        raise RecipeError(loaded.problem("model.add_tokens", f"{message} or the template, or leave this out"))
    if unused:
        yield f"model.add_tokens: no training row has {_listed(unused)}: the embedding stays where it begins"


def _untrained(loaded: LoadedRecipe, inputs: Inputs, used: npt.NDArray[np.bool_]) -> Iterator[str]:
    files, tokenizer = inputs.base_files, inputs.tokenizer
    found = {module: _never_trained(loaded.recipe.lora, inputs, module, used) for module in files.vocabulary}
    ids = dict.fromkeys(id_ for rows in found.values() for id_ in rows)
    if not ids:
        return
    names = {id_: str(tokenizer.convert_ids_to_tokens(id_)) for id_ in ids}
    mend = _mend(loaded.recipe, [*loaded.recipe.model.add_tokens, *names.values()])
    stops = files.stop_token_ids | {int(tokenizer.eos_token_id)}
    head = list(found)[-1]  # the embedding, where the head is the same
    if never := {id_: why for id_, why in found[head].items() if id_ in stops}:
        ends = ", ".join(f"{names[id_]} (its row is {why})" for id_, why in never.items())
        message = (
            f"answers end with {ends}, which was never trained in {head} and is frozen: the model could never stop"
        )
        raise ModelError(f"{message}; {mend}", where=files.name)
    for module, rows in found.items():
        if rows:
            listed = ", ".join(f"{names[id_]} ({why})" for id_, why in rows.items())
            yield f"{module}: rows of tokens in the data were never trained and are frozen: {listed}; {mend}"


def _never_trained(lora: LoraSection, inputs: Inputs, module: str, used: npt.NDArray[np.bool_]) -> dict[int, str]:
    """Ids that rows hold, whose row of `module` the base never trained and this run does not, and what it is."""
    files = inputs.base_files
    tensor = files.tensors[files.vocabulary[module]]
    trained = _trained_rows(lora, module, is_embedding=module == next(iter(files.vocabulary)))
    if trained is None:
        return {}
    reserved = reserved_ids(inputs.tokenizer, rows=tensor.shape[0])
    suspects = [id_ for id_ in reserved if used[id_] and id_ not in (*trained, *files.trained_token_ids)]
    rows = rows_on_disk(files.directory, tensor)
    return never_trained(rows, suspects, ordinary=range(tensor.shape[0]), peers=reserved)


def _trained_rows(lora: LoraSection, module: str, *, is_embedding: bool) -> tuple[int, ...] | None:
    """Ids whose rows of `module` are trained; None where all of them are."""
    last = module.rpartition(".")[2]
    targets = lora.target_modules
    if isinstance(targets, str):
        is_adapted = targets != "all-linear" and re.fullmatch(targets, module) is not None
    else:
        is_adapted = last in targets or module in targets
    if is_adapted or {last, module} & {*(lora.modules_to_save or ())}:
        return None
    indices = lora.trainable_token_indices or ()
    if isinstance(indices, dict):
        return tuple(id_ for name in (last, module) for id_ in indices.get(name, ()))
    return indices if is_embedding else ()


def _mend(recipe: Recipe, tokens: Iterable[str]) -> str:
    wanted = recipe.model_copy(update={"model": recipe.model.model_copy(update={"add_tokens": tuple(tokens)})})
    if any(rows_of_added_tokens_can_be_trained(wanted)):
        return "use a template of tokens that the base knows, or the instruct version of the model"
    written = json.dumps(list(tokens), ensure_ascii=False)
    return f"train their rows with model.add_tokens: {written}, or use a template of tokens that the base knows"


def _listed(tokens: Iterable[str]) -> str:
    return " or ".join(tokens)
