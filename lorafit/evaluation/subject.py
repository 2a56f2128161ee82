"""What is evaluated: an adapter with its base, tokenizer and recipe, and the model it was merged into."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafit.builders.base_model import check_base_model
from lorafit.builders.hub_snapshot import SMALL_FILES, hub_snapshot
from lorafit.builders.model_files import TOKENIZER_FILES, BaseModelFiles, model_directory
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.builders.tokenizer_files import read_tokenizer
from lorafit.data.guess_columns import familiar_mapping, first_row
from lorafit.errors import ModelError, RecipeError, RunDirError
from lorafit.merging.adapted_model import refuse_misfit
from lorafit.merging.adapter_files import WEIGHTS, Adapter, read_adapter, refuse_moved_base
from lorafit.merging.identity import REPORT, refuse_wrong_base
from lorafit.merging.verify_reference import is_vocabulary
from lorafit.recipe import LoadedRecipe, load
from lorafit.recipe.paths import looks_local
from lorafit.recipe.recipe import Recipe
from lorafit.recipe.recipe_yaml import dump
from lorafit.recipe.sections import ModelSection, Source
from lorafit.storage.files import sha256_of
from lorafit.storage.json_text import parsed
from lorafit.storage.stage import scratch
from lorafit.tasks import TASKS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """All of it found whole and fitting together, before a weight of the base is read."""

    adapter: Adapter
    recipe: Recipe
    """The run's; for a plain adapter one of defaults."""
    base_files: BaseModelFiles
    tokenizer: PreTrainedTokenizerBase
    merged: Path | None
    """Directory of the merged model."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """What answers end on: the base model's, and the token that the run's template ends texts with."""
        return self.base_files.stop_token_ids | {int(self.tokenizer.eos_token_id)}


def read_subject(
    run_or_adapter: str,
    *,
    data: Path | None,
    merged: Path | None,
    base: str | None,
    overrides: Sequence[str],
) -> Subject:
    """A run, or a plain PEFT adapter (directory or Hub id), on `data` instead of the run's held-out rows.

    Raises RunDirError, AdapterError, ModelError, RecipeError.
    """
    directory = _directory(run_or_adapter)
    adapter = read_adapter(directory, base=base, overrides=overrides)
    if adapter.recipe is None:
        adapter = _with_recipe(adapter, data=data, overrides=overrides)
    elif data is not None:
        adapter = read_adapter(directory, base=base, overrides=[*_instead(data, adapter.recipe.recipe), *overrides])
    loaded: LoadedRecipe = adapter.recipe  # type: ignore[assignment]  # both ways have given it one
    recipe = loaded.recipe
    refuse_moved_base(adapter)
    base_files = check_base_model(adapter.base, quantization=recipe.quantization, task=TASKS[recipe.task])
    refuse_wrong_base(adapter, base_files, may_be_zero=True)
    refuse_misfit(adapter, base_files)
    tokenizer = load_tokenizer(adapter.base, stop_token=recipe.data.stop_token)
    _refuse_other_tokenizer(tokenizer, adapter.directory, base=base_files.name)
    merged = _merged_model(adapter, merged)
    if merged is not None:
        _refuse_other_tokenizer(tokenizer, merged, base=base_files.name)
    return Subject(adapter, recipe, base_files, tokenizer, merged)


def _directory(run_or_adapter: str) -> Path:
    if looks_local(run_or_adapter, Path()):
        return Path(run_or_adapter).expanduser()
    section = ModelSection(model_name_or_path=run_or_adapter)
    try:
        return hub_snapshot(section, files=(*SMALL_FILES, WEIGHTS))
    except ModelError as error:
        message = f"is no directory here, and as an adapter of the Hub: {error.problems[0].message}"
        raise RunDirError(message, where=run_or_adapter) from None


def _with_recipe(adapter: Adapter, *, data: Path | None, overrides: Sequence[str]) -> Adapter:
    """A plain adapter with the recipe of its base and rows: defaults, but for what `overrides` say."""
    if data is None:
        raise RecipeError("a plain adapter knows no rows: name some with --data FILE", where=str(adapter.directory))
    name = adapter.base.model_name_or_path
    here = str(Path(name).resolve()) if looks_local(name, Path()) else name
    written: dict[str, Any] = {
        "model": {
            **adapter.base.model_dump(exclude_unset=True),
            "model_name_or_path": here,
            "add_tokens": list(_trained_tokens(adapter)),
        },
        "data": {"train": [{"path": "none"}], "eval": [_source(data, None)]},
    }
    with scratch() as work:
        path = work / "adapter.yaml"
        path.write_text(dump(written), encoding="utf-8")
        loaded = load(path, overrides=overrides)
    return replace(adapter, base=loaded.recipe.model, recipe=loaded)


def _trained_tokens(adapter: Adapter) -> Iterator[str]:
    """The tokens whose rows an adapter holds and the base lacks, by the tokenizer beside it; none where it trains no
    rows."""
    if not any((adapter.directory / name).is_file() for name in TOKENIZER_FILES):
        return
    if adapter.rows_needed:
        added = read_tokenizer(adapter.directory, trust_remote_code=False).added_tokens_decoder
        yield from (added[id_].content for id_ in adapter.trained_token_ids if id_ in added)
    elif any(is_vocabulary(name) for name in adapter.tensors):  # all rows: of a vocabulary that may have grown
        added = read_tokenizer(adapter.directory, trust_remote_code=False).added_tokens_decoder
        known = read_tokenizer(model_directory(adapter.base), trust_remote_code=False).get_vocab()
        yield from (token.content for _, token in sorted(added.items()) if token.content not in known)


def _instead(data: Path, recipe: Recipe) -> list[str]:
    """The overrides that put `data` in place of the run's held-out rows."""
    return [f"data.eval={json.dumps([_source(data, recipe.data.train[0])])}", "data.eval_fraction=null"]


def _source(data: Path, like: Source | None) -> dict[str, Any]:
    """A source of the rows of `data`: with the columns of the run's own where the file has them, else guessed."""
    source: dict[str, Any] = {"path": str(data.expanduser().resolve())}
    columns = (first_row(source["path"]) or {}).keys()
    if like is not None and like.columns and set(like.columns.values()) <= columns:
        return source | {"columns": dict(like.columns)} | ({"format": like.format} if like.format else {})
    return source | familiar_mapping(source["path"])


def _refuse_other_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, *, base: str) -> None:
    """A tokenizer that lies beside the weights must cut text as the base's does. Raises ModelError."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return
    if (directory / "config.json").is_file():
        other = load_tokenizer(ModelSection(model_name_or_path=str(directory.resolve())))
    else:
        other = type(tokenizer).from_pretrained(directory)
    ours, theirs = _way_of_cutting(tokenizer), _way_of_cutting(other)
    if wrong := [part for part in ours if ours[part] != theirs[part]]:
        message = f"has another tokenizer than {base} ({', '.join(wrong)} differ): its figures could not be compared"
        raise ModelError(f"{message}; put the tokenizer of training back in both places", where=str(directory))


def _way_of_cutting(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "vocabulary": tokenizer.get_vocab(),
        "merges": core["model"].get("merges"),
        "normalizer": core["normalizer"],
        "pre_tokenizer": core["pre_tokenizer"],
        "eos_token": tokenizer.eos_token,
    }


def _merged_model(adapter: Adapter, asked_for: Path | None) -> Path | None:
    """The merged model to evaluate besides: the one asked for, else RUN/merged where there is one.

    Raises ModelError when it was made of another adapter.
    """
    if asked_for is None and adapter.run_dir is not None:
        beside = adapter.run_dir.path / "merged"
        merged = beside if (beside / "config.json").is_file() else None
    else:
        merged = asked_for
    if merged is None:
        return None
    report = merged / REPORT
    if not (merged / "config.json").is_file():
        raise ModelError("holds no model: name the directory that `lorafit merge` wrote", where=str(merged))
    if not report.is_file():
        logger.warning(f"{merged}: has no {REPORT}; not checked: whether it was made of this adapter")
        return merged
    try:
        made_of = parsed(report.read_text(encoding="utf-8"))["adapter_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"is not the report of a merge ({error}): merge again", where=str(report)) from None
    if sha256_of(adapter.weights) != made_of:
        raise ModelError(
            "was made of another adapter, or of this one before it changed: merge again, or name another with --merged",
            where=str(merged),
        )
    return merged
