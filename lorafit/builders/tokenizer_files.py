"""The files of a tokenizer in, the library's object out."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorafit.builders.model_files import TOKENIZER_FILES, read_json
from lorafit.errors import ModelError


def read_tokenizer(directory: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory, as it lies there. Raises ModelError."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            "has no tokenizer: copy its files there (tokenizer.json, tokenizer_config.json)", where=str(directory)
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            read_json(directory / name)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        # The tokenizers library raises plain Exception for a file it cannot use; anything rarer is a bug and is kept.
        if type(error) not in (Exception, OSError, ValueError, KeyError, TypeError, ImportError):
            raise
        message = " ".join(str(error).split())[:300]
        raise ModelError(f"its tokenizer cannot be read: {message}", where=str(directory)) from error
