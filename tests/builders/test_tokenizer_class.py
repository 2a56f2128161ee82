"""A tokenizer that is read without AutoTokenizer is the one that AutoTokenizer gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto import tokenization_auto

from lorafit.builders.tokenizer_class import registered_classes, tokenizer_class_name, wrongly_declared
from lorafit.builders.tokenizer_files import read_tokenizer
from support.families import FAMILIES

SETTLED = {
    ("llama", "TokenizersBackend"): "TokenizersBackend",
    ("llama", "PreTrainedTokenizerFast"): "TokenizersBackend",
    ("gpt2", "GPT2Tokenizer"): "GPT2Tokenizer",
    ("gpt2", "GPT2TokenizerFast"): "GPT2Tokenizer",
    ("gpt2", "PreTrainedTokenizerFast"): "TokenizersBackend",
    ("qwen2", "Qwen2Tokenizer"): "Qwen2Tokenizer",
    ("qwen2", "PreTrainedTokenizerFast"): "Qwen2Tokenizer",
    ("qwen3", "Qwen2TokenizerFast"): "Qwen2Tokenizer",
    ("gemma2", "GemmaTokenizer"): "GemmaTokenizer",
    ("gpt_neox", "GPTNeoXTokenizerFast"): "GPTNeoXTokenizer",
    ("olmo2", "GPT2Tokenizer"): "TokenizersBackend",
    ("smollm3", "GPT2TokenizerFast"): "GPT2Tokenizer",
    ("phi3", "PreTrainedTokenizerFast"): "TokenizersBackend",
}
LEFT_TO_AUTO = [
    ("llama", "LlamaTokenizer"),  # its file splits bytes
    ("mistral", "PreTrainedTokenizerFast"),
    ("qwen3", "GPT2Tokenizer"),
    ("llama", None),
    ("unheard-of", "PreTrainedTokenizerFast"),
]


def saved(directory: Path, family: str, *, kind: str, declared: str | None) -> Path:
    """A family's tokenizer in the directory of a model of that type."""
    FAMILIES[family].tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": kind}))
    settings = directory / "tokenizer_config.json"
    facts = json.loads(settings.read_text()) | {"tokenizer_class": declared}
    settings.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
    return directory


def told(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that tells one tokenizer from another."""
    facts = {"class": type(tokenizer), "core": tokenizer.backend_tokenizer.to_str()}
    kept = ("special_tokens_map", "init_kwargs", "chat_template", "padding_side", "model_max_length", "name_or_path")
    return facts | {name: str(getattr(tokenizer, name)) for name in kept}


def test_the_tables_are_those_of_the_library() -> None:
    theirs = tokenization_auto.TOKENIZER_MAPPING_NAMES
    ours = registered_classes()
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    assert {kind: theirs[kind] for kind, name in ours.items() if name is not None} == {
        kind: name for kind, name in ours.items() if name is not None
    }
    assert wrongly_declared() == tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_by_the_library(family: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, family, kind="llama", declared="PreTrainedTokenizerFast")
    assert tokenizer_class_name(directory) == "TokenizersBackend"
    found, wanted = read_tokenizer(directory, trust_remote_code=False), AutoTokenizer.from_pretrained(directory)
    assert told(found) == told(wanted)
    text = "Grüße, <|im_start|>世界</s>  \n x<end_of_turn>y"
    assert found(text)["input_ids"] == wanted(text)["input_ids"]


@pytest.mark.parametrize(("kind", "declared"), SETTLED)
def test_the_class_is_that_of_the_library(kind: str, declared: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, next(iter(FAMILIES)), kind=kind, declared=declared)
    assert tokenizer_class_name(directory) == SETTLED[kind, declared]
    found, wanted = read_tokenizer(directory, trust_remote_code=False), AutoTokenizer.from_pretrained(directory)
    assert type(found).__name__ == SETTLED[kind, declared]
    assert told(found) == told(wanted)


@pytest.mark.parametrize(("kind", "declared"), LEFT_TO_AUTO)
def test_what_two_files_do_not_settle_is_left_to_the_library(kind: str, declared: str | None, tmp_path: Path) -> None:
    directory = saved(tmp_path, next(iter(FAMILIES)), kind=kind, declared=declared)
    assert tokenizer_class_name(directory) is None


def test_code_that_comes_with_a_model_is_left_to_the_library(tmp_path: Path) -> None:
    directory = saved(tmp_path, next(iter(FAMILIES)), kind="llama", declared="TokenizersBackend")
    settings = directory / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | own))
    assert tokenizer_class_name(directory) is None
