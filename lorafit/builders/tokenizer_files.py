"""The files of a tokenizer in, the library's object out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from lorafit.builders.model_files import TOKENIZER_FILES, read_json
from lorafit.builders.template_files import DEFAULT, chat_templates
from lorafit.builders.tokenizer_class import tokenizer_class_name
from lorafit.errors import ModelError


def read_tokenizer(directory: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory, as it lies there, with its chat templates. Raises ModelError."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            "has no tokenizer: copy its files there (tokenizer.json, tokenizer_config.json)", where=str(directory)
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            read_json(directory / name)
    templates = chat_templates(directory)
    try:
        tokenizer = _from_files(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        # The tokenizers library raises plain Exception for a file it cannot use; anything rarer is a bug and is kept.
        if type(error) not in (Exception, OSError, ValueError, KeyError, TypeError, ImportError):
            raise
        message = " ".join(str(error).split())[:300]
        raise ModelError(f"its tokenizer cannot be read: {message}", where=str(directory)) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} has no fast version (tokenizer.json), which tells the characters that a token "
            "stands for; use a model that has one",
            where=str(directory),
        )
    if templates:  # without a mark of byte order, and also from where transformers looks for those of processors only
        tokenizer.chat_template = templates[DEFAULT] if list(templates) == [DEFAULT] else templates
    return tokenizer


def _from_files(directory: Path, *, trust_remote_code: bool) -> Any:
    """What AutoTokenizer makes of them; most often without it, because importing it takes as long as torch does."""
    name = tokenizer_class_name(directory)
    if name is not None and hasattr(transformers, name):
        return getattr(transformers, name).from_pretrained(directory)
    return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
