"""A base model on disk: what its files say, before a weight is read and without torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.builders.hub_snapshot import cached_snapshot, hub_snapshot
from lorafit.builders.modules import Modules
from lorafit.builders.weight_files import FLOATS, INDEX, TensorInfo, fingerprint, is_lfs_pointer, shard_names
from lorafit.errors import ModelError, Problem
from lorafit.recipe.paths import looks_local
from lorafit.recipe.sections import DataSection, ModelSection, QuantizationSection
from lorafit.storage.json_text import parsed

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model"),
    *("tekken.json", "qwen.tiktoken", "tiktoken.model", "sentencepiece.bpe.model"),
)

GENERATION = "generation_config.json"

LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers")
MOST_LAYERS = 10_000
"""Ten times the deepest model that was ever trained."""


@dataclass(frozen=True)
class AddedTokens:
    """What a recipe adds to the vocabulary of its base."""

    ids: Mapping[str, int]
    """Every token of `model.add_tokens`."""
    pieces: Mapping[str, tuple[int, ...]]
    """What each is cut into without it, of the rows there are; empty where nothing is known of its characters."""
    known: frozenset[str]
    """Those that the base's tokenizer has."""
    reserved: tuple[int, ...]
    """Ids of the base whose rows may never have been trained: of its tokenizer's added tokens, and of none."""
    rows: int
    """Of the base's embedding, as it lies on disk."""

    @property
    def rows_needed(self) -> int:
        """Of the embedding with all of them; spare rows, which many bases have, are used before it grows."""
        return max(self.rows, 1 + max(self.ids.values(), default=-1))

    @property
    def trained(self) -> tuple[int, ...]:
        """Ids of the rows that are trained and saved: all that the base does not have, or not for these tokens."""
        return tuple(sorted({*self.ids.values(), *range(self.rows, self.rows_needed)}))


@dataclass(frozen=True)
class BaseModelFiles:
    """A base model whose files are whole."""

    name: str
    """What the recipe says: a Hub id or a directory."""
    directory: Path
    """Where the files lie; for a Hub model its snapshot in the cache."""
    revision: str | None
    """Commit of a Hub model; None for a directory."""
    config: Mapping[str, Any]
    """config.json."""
    tensors: Mapping[str, TensorInfo]
    stop_token_ids: frozenset[int]
    """What generation stops on: `eos_token_id` of generation_config.json, else of config.json."""
    vocab_size: int
    """Rows of the embedding, those of added tokens among them."""
    modules: Modules | None = None
    """What an adapter can name; None for a merge, which begins none."""
    added: AddedTokens | None = None
    """What `model.add_tokens` adds."""
    vocabulary: Mapping[str, str] = field(default_factory=dict)
    """The modules with a row for every token to their tensors: the embedding, then the head where it has its own. Left
    out is what lies on disk under other names than in memory."""

    @property
    def trained_token_ids(self) -> tuple[int, ...]:
        """Ids whose rows of embedding and head are trained and saved."""
        return () if self.added is None else self.added.trained

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def fingerprint(self) -> str:
        """Hash of config.json, the tensors' names, types and shapes, and samples of their bytes."""
        return fingerprint(self.directory, config=self.config, tensors=self.tensors)


def is_on_hub(section: ModelSection) -> bool:
    """Whether the model is a Hub id; what looks like a path never reaches the Hub."""
    return not looks_local(section.model_name_or_path, Path())


def model_directory(section: ModelSection) -> Path:
    """Directory of the model's settings and tokenizer; a Hub model's are fetched into the cache, not its weights.

    Raises ModelError when there is no such directory or Hub model.
    """
    if is_on_hub(section):
        return hub_snapshot(section) / section.extra.get("subfolder", "")
    return _local_directory(section)


def directory_at_hand(section: ModelSection) -> Path | None:
    """As `model_directory`, without the network: None for a Hub model whose settings are not in the cache."""
    if not is_on_hub(section):
        return _local_directory(section)
    snapshot = cached_snapshot(section)
    directory = snapshot / section.extra.get("subfolder", "") if snapshot else None
    return directory if directory and (directory / "config.json").is_file() else None


def _local_directory(section: ModelSection) -> Path:
    directory = Path(section.model_name_or_path).expanduser()
    try:
        if not directory.exists():
            raise ModelError("there is no such directory: correct the path", where=section.model_name_or_path)
        if not directory.is_dir():
            raise ModelError("is a file: name the directory it lies in", where=section.model_name_or_path)
        directory /= section.extra.get("subfolder", "")
        if not directory.is_dir() or not any(directory.iterdir()):
            message = "is empty or missing: copy the model there, or name another directory"
            raise ModelError(message, where=str(directory))
    except OSError as error:
        message = f"cannot be read ({error.strerror}): give your user the right to, or name another directory"
        raise ModelError(message, where=str(directory)) from None
    return directory


def fetch_weights(section: ModelSection, *, directory: Path) -> None:
    """Bring the weight files of a Hub model into the cache, those that transformers reads and no others."""
    if is_on_hub(section):
        hub_snapshot(section, files=shard_names(directory) if (directory / INDEX).is_file() else ("model.safetensors",))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the model. Raises ModelError when it is not one."""
    try:
        if is_lfs_pointer(path):
            raise ModelError("is a git-lfs pointer: run `git lfs pull` in that directory", where=str(path))
        value = parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror}): give your user the right to", where=str(path)) from None
    except ValueError as error:
        raise ModelError(f"is not JSON ({error}): copy the file again", where=str(path)) from None
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object: copy the file again", where=str(path))
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a base model. Raises ModelError when it is missing, broken, or there is an adapter.

    transformers would load the adapter on top of its base, without a word.
    """
    adapter = directory / "adapter_config.json"
    if adapter.is_file() and (directory / "config.json").is_file():
        raise ModelError(
            "lies in a base model and would be loaded with it: move the adapter elsewhere", where=str(adapter)
        )
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ModelError(
            f"is an adapter, not a base model: set model.model_name_or_path to its base ({base})", where=str(directory)
        )
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError("has no config.json: name the directory that from_pretrained loads", where=str(directory))
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ModelError("has no model_type: copy the file again, or write the architecture's there", where=str(path))
    _refuse_countless_layers(config, where=str(path))
    return config


def _refuse_countless_layers(config: Mapping[str, Any], *, where: str) -> None:
    """They would be built one by one before anything else is looked at. Raises ModelError."""
    inner = config.get("text_config")
    for settings in (config, inner if isinstance(inner, Mapping) else {}):
        for key in LAYER_COUNTS:
            count = settings.get(key)
            if isinstance(count, int) and count > MOST_LAYERS:
                message = f"says {key}: {count:,}, and no model has more than {MOST_LAYERS:,}: copy the file again"
                raise ModelError(message, where=where)


def stop_token_ids(directory: Path, *, config: Mapping[str, Any]) -> frozenset[int]:
    """Ids that generation stops on. Raises ModelError when generation_config.json cannot be read."""
    path = directory / GENERATION
    value = read_json(path).get("eos_token_id") if path.is_file() else None
    if value is None:
        path = directory / "config.json"
        value = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise ModelError(f"has eos_token_id {value!r}; it is a token id or a list of them", where=str(path))
    return frozenset(ids)


def stop_problems(
    directory: Path, *, stops: Collection[int], rows: int | None, data: DataSection | None
) -> Iterator[Problem]:
    """Stop tokens that an embedding of so many `rows` does not hold, and none at all where answers of `data` end."""
    if rows is not None and (outside := sorted(token for token in stops if token >= rows)):
        message = f"eos_token_id {outside[0]} has no row in the embedding of {rows:,}: correct it there and in"
        yield Problem(str(directory / "config.json"), f"{message} generation_config.json")
    if not stops and data is not None and data.stop_token is None and data.train_on != "all":
        message = "names no token that generation stops on: write eos_token_id in generation_config.json, or"
        yield Problem(str(directory), f"{message} data.stop_token in the recipe")


def config_problems(directory: Path, *, config: Mapping[str, Any], section: ModelSection) -> Iterator[Problem]:
    """What in config.json keeps the model from being loaded as the recipe says."""
    where = str(directory / "config.json")
    kernel = next((value for value in _attention_names(config) if "/" in value), None)
    if kernel and section.attn_implementation == "auto":
        yield Problem(
            where,
            f"asks for the attention kernel {kernel!r}, code downloaded from the Hub: set model.attn_implementation "
            "(sdpa, eager or flash_attention_2)",
        )
    if "transformers_weights" in config:
        yield Problem(
            where, "renames the weights (transformers_weights): drop the key, call the file model.safetensors"
        )
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        yield Problem(str(directory), "has no tokenizer: copy its files there (tokenizer.json, tokenizer_config.json)")


def _attention_names(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _attention_names(value)
        elif key.endswith("attn_implementation") and isinstance(value, str):
            yield value


def quantization_problems(
    directory: Path, *, config: Mapping[str, Any], quantization: QuantizationSection | None
) -> Iterator[Problem]:
    """A checkpoint that is quantised already must be a bitsandbytes one, and the recipe must say the same as it."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping):
        return
    where = str(directory / "config.json")
    method = str(stored.get("quant_method", "bitsandbytes"))
    if method != "bitsandbytes":
        yield Problem(
            where,
            f"is a checkpoint quantised with {method}: name the unquantised model it was made from, and set "
            "quantization.load_in_4bit: true to train it in 4 bits",
        )
        return
    if quantization is None:
        bits = "load_in_8bit" if stored.get("load_in_8bit") else "load_in_4bit"
        yield Problem(where, f"is a bitsandbytes checkpoint: write `quantization: {{{bits}: true}}` in the recipe too")
        return
    for key, wanted in quantization.model_dump(exclude={"extra", "llm_int8_skip_modules"}).items():
        if key in stored and wanted not in ("auto", stored[key]):
            yield Problem(
                f"quantization.{key}",
                f"is {json.dumps(wanted)}, the checkpoint is quantised with {json.dumps(stored[key])} (config.json): "
                "write that, or name the unquantised model",
            )


def weight_problems(
    directory: Path, *, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> Iterator[Problem]:
    """Weights stored in a type that cannot be trained on top of."""
    if "quantization_config" in config:
        return
    odd = [name for name, tensor in tensors.items() if name.endswith("weight") and tensor.dtype not in FLOATS]
    if odd:
        tensor = tensors[odd[0]]
        yield Problem(
            str(directory / tensor.file),
            f"stores {odd[0]} ({len(odd)} weights in all) as {tensor.dtype}, and config.json does not say how to read "
            "that: name a model in bfloat16, float16 or float32",
        )
