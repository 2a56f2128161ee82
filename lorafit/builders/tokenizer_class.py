"""The class that AutoTokenizer takes for a directory, told without it: importing AutoTokenizer imports torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from lorafit.builders.architectures import model_types, source_of_auto
from lorafit.builders.model_files import read_json

GENERIC = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "PythonBackend"})
"""Names of the class that does what tokenizer.json says and nothing else."""
PLAIN = "TokenizersBackend"

_ENTRY = re.compile(r'^ +\("([\w.-]+)", "(\w+)"(?: if is_tokenizers_available\(\) else None)?\),$', re.MULTILINE)
_TYPE = re.compile(r'^ +\(?"([\w.-]+)",', re.MULTILINE)


@cache
def registered_classes() -> Mapping[str, str | None]:
    """`model_type` to the class that transformers has for it (TOKENIZER_MAPPING_NAMES), read off its source; None
    where that depends on what else is installed. A test compares it with the library's own."""
    table = source_of_auto("tokenization_auto.py").partition("\nTOKENIZER_MAPPING_NAMES = ")[2].partition("\n)\n")[0]
    return dict.fromkeys(wrongly_declared(), PLAIN) | dict.fromkeys(_TYPE.findall(table)) | dict(_ENTRY.findall(table))


@cache
def wrongly_declared() -> frozenset[str]:
    """Those whose checkpoints name the wrong class (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)."""
    source = source_of_auto("tokenization_auto.py")
    return frozenset(
        _TYPE.findall(source.partition("\nMODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS")[2].partition("}")[0])
    )


def tokenizer_class_name(directory: Path) -> str | None:
    """The name of the class, where config.json and tokenizer_config.json alone settle it, as those of most models do;
    None where AutoTokenizer has to look further: code of the model's own, Mistral's format, files of old."""
    files = {name: directory / name for name in ("config.json", "tokenizer_config.json", "tokenizer.json")}
    if not all(file.is_file() for file in files.values()) or (directory / "tekken.json").exists():
        return None
    if not directory.is_absolute():  # AutoTokenizer knows some models by the start of what they are called
        return None
    config, settings = read_json(files["config.json"]), read_json(files["tokenizer_config.json"])
    kind, declared = config.get("model_type"), settings.get("tokenizer_class")
    if kind not in model_types() or not isinstance(declared, str) or "auto_map" in {**config, **settings}:
        return None
    declared = declared.removesuffix("Fast") if declared not in GENERIC else PLAIN
    if declared == "LlamaTokenizer" and b'"ByteLevel"' in files["tokenizer.json"].read_bytes():
        return None  # Llama 3 under the class of Llama 2, which AutoTokenizer warns of
    return _chosen(kind, declared)


def _chosen(kind: str, declared: str) -> str | None:
    """As AutoTokenizer chooses between the class of a model type and the one that a checkpoint declares."""
    if kind not in registered_classes():
        return declared
    registered = registered_classes()[kind]
    if registered is None:
        return None
    registered = registered.removesuffix("Fast") if registered not in GENERIC else PLAIN
    if registered in (PLAIN, declared):
        return registered
    if declared == PLAIN:
        return registered if kind in wrongly_declared() else PLAIN
    return None
