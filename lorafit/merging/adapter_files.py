"""An adapter on disk: its settings, its tensors, and the base model it says it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.builders.model_files import is_on_hub
from lorafit.builders.weight_files import TensorInfo, tensors_in
from lorafit.errors import AdapterError, ModelError, Problem, RunDirError
from lorafit.merging.adapter_claims import names_problem, settings_problems
from lorafit.recipe import LoadedRecipe, load
from lorafit.recipe.sections import ModelSection
from lorafit.storage.files import read_regular
from lorafit.storage.json_text import parsed
from lorafit.storage.run_dir import RunDir

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter directory, read but for its weights."""

    directory: Path
    config: Mapping[str, Any]
    """adapter_config.json."""
    tensors: Mapping[str, TensorInfo]
    base: ModelSection
    """The base model: the recipe's, else what the adapter names, unless another was asked for."""
    run_dir: RunDir | None
    """The run that trained it; None for a plain PEFT adapter."""
    recipe: LoadedRecipe | None
    """The recipe of that run."""

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.directory / WEIGHTS

    @property
    def trained_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens whose rows it trains by themselves."""
        indices = self.config.get("trainable_token_indices") or []
        lists = indices.values() if isinstance(indices, dict) else [indices]
        return tuple(sorted({id_ for ids in lists for id_ in ids}))

    @property
    def rows_needed(self) -> int:
        """Rows of the embedding that hold all of these; 0 where there are none."""
        return 1 + max(self.trained_token_ids, default=-1)

    @property
    def total_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_adapter(run_or_adapter: Path, *, base: str | None = None, overrides: Sequence[str] = ()) -> Adapter:
    """The adapter of a run directory, or a plain PEFT adapter directory; `base` names another base model, and
    `overrides` change the recipe of a run.

    Raises RunDirError when there is none, AdapterError when its files cannot be used or name no base model.
    """
    if (run_or_adapter / "adapter" / CONFIG).is_file():
        run = RunDir(run_or_adapter)
        recipe = load(run.recipe, overrides=overrides)
        written = recipe.recipe.model
        named = written if base is None else ModelSection(model_name_or_path=base, add_tokens=written.add_tokens)
        return _read(run.adapter, base=named, run_dir=run, recipe=recipe)
    if not (run_or_adapter / CONFIG).is_file():
        raise RunDirError(_no_adapter(run_or_adapter), where=str(run_or_adapter))
    return _read(run_or_adapter, base=_named_base(run_or_adapter, base), run_dir=None, recipe=None)


def _no_adapter(directory: Path) -> str:
    if not directory.is_dir():
        return f"is not a directory: name a run directory that training has finished, or one with an {CONFIG}"
    # peft saves an adapter of another name than `default` in a folder of that name.
    if inside := sorted(str(path.parent) for path in directory.glob(f"*/{CONFIG}")):
        return f"holds no adapter itself, but {len(inside)} in folders of their names: name {' or '.join(inside[:3])}"
    return f"holds no adapter: name a run directory that training has finished, or one with an {CONFIG}"


def refuse_moved_base(adapter: Adapter) -> None:
    """Raises ModelError when the base is a directory that is not there."""
    base = adapter.base
    if not is_on_hub(base) and not Path(base.model_name_or_path).expanduser().exists():
        said_by = adapter.directory / CONFIG if adapter.run_dir is None else adapter.run_dir.recipe
        message = f"there is no such directory; {said_by} names it as the base model: say where that is with --base"
        raise ModelError(message, where=base.model_name_or_path)


def _read(directory: Path, *, base: ModelSection, run_dir: RunDir | None, recipe: LoadedRecipe | None) -> Adapter:
    config = read_adapter_config(directory)
    if not (directory / WEIGHTS).is_file():
        pickled = directory / "adapter_model.bin"
        problem = (
            f"has its weights in {pickled.name}, a pickle that can run code when it is read; load it and write it "
            "with `save_pretrained`, which writes safetensors"
            if pickled.is_file()
            else f"has no {WEIGHTS}: copy the whole adapter again"
        )
        raise AdapterError(problem, where=str(directory))
    try:
        tensors = tensors_in(directory / WEIGHTS)
    except ModelError as error:
        raise AdapterError(error.problems) from None
    except OSError as error:
        message = f"cannot be read ({error.strerror}): give your user the right to"
        raise AdapterError(message, where=str(directory / WEIGHTS)) from None
    if (misnamed := names_problem(tensors)) is not None:
        raise AdapterError(misnamed, where=str(directory / WEIGHTS))
    return Adapter(directory=directory, config=config, tensors=tensors, base=base, run_dir=run_dir, recipe=recipe)


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json. Raises AdapterError when it is not the settings of a LoRA or AdaLoRA adapter, or peft would
    not read all of them."""
    path = directory / CONFIG
    try:
        config = parsed(read_regular(path))
    except PermissionError as error:
        message = f"cannot be read ({error.strerror}): give your user the right to"
        raise AdapterError(message, where=str(path)) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"is not JSON ({error}): copy the file again", where=str(path)) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in ("LORA", "ADALORA"):
        raise AdapterError(f"has peft_type {kind!r}; lorafit reads LORA and ADALORA adapters", where=str(path))
    if problems := [Problem(str(path), problem) for problem in settings_problems(config)]:
        raise AdapterError(problems)
    return config


def _named_base(directory: Path, base: str | None) -> ModelSection:
    if base is not None:
        return ModelSection(model_name_or_path=base)
    config = read_adapter_config(directory)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise AdapterError("names no base model: say which with --base", where=str(directory / CONFIG))
    return ModelSection(model_name_or_path=name, revision=config.get("revision") or "main")
