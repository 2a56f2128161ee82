"""Small data files, sections and tokenizers for the tests of the data room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorafit.data import DataScan, scan
from lorafit.data.listing import Side
from lorafit.data.prepare import PreparedData, prepare
from lorafit.errors import DataError
from lorafit.recipe.sections import DataSection, Source

PAIR = {"prompt": "One?", "completion": "Two."}
SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot|>")


def section(*paths: Path | str, source: dict[str, Any] | None = None, **settings: Any) -> DataSection:
    """A data section over the files."""
    sources = tuple(Source(path=str(path), **(source or {})) for path in paths)
    return DataSection(train=sources, **settings)


def scanned(path: Path, content: str | bytes, /, *, source: dict[str, Any] | None = None, **settings: Any) -> DataScan:
    """What `scan` makes of a file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return scan(section(path, source=source, **settings), seed=0)


def rows_of(found: DataScan, side: Side = "train") -> list[Any]:
    """The rows of one side, read again."""
    return [row for own, row in found.rows() if own == side]


def scan_problems(path: Path, content: str | bytes, /, **settings: Any) -> list[str]:
    """What `scan` refuses about a file with this content, one line per problem, without the directory."""
    with pytest.raises(DataError) as error:
        scanned(path, content, **settings)
    assert error.value.exit_code == 3
    return [str(problem).replace(f"{path.parent}/", "") for problem in error.value.problems]


def json_lines(*rows: Any) -> str:
    """One JSON value a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def word_tokenizer(chat_template: str | None = None, **settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges, so that tokens are words and answers can share one with prompts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["the answer is one two three the question is user assistant model"] * 4, trainer)
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"} | settings
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    others = [token for token in SPECIAL if token not in names.values()]
    tokenizer.add_special_tokens({"additional_special_tokens": others})
    tokenizer.chat_template = chat_template
    return tokenizer


def prepared(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stops: frozenset[int] | None = None,
    max_length: int = 4096,
    vocab_size: int | None = None,
    cache_dir: Path | None = None,
) -> PreparedData:
    """`prepare` with everything else as it mostly is."""
    return prepare(
        data,
        task="causal_lm",
        tokenizer=tokenizer,
        max_length=max_length,
        seed=0,
        stop_token_ids=frozenset({tokenizer.eos_token_id}) if stops is None else stops,
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
        cache_dir=cache_dir,
    )


def ids_of(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> frozenset[int]:
    """One for each of these tokens."""
    ids: Any = tokenizer.convert_tokens_to_ids(list(tokens))
    return frozenset(ids)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Any], tools: Any = None, *, add_generation_prompt: bool = True
) -> list[int]:
    """By the tokenizer's own template."""
    made: Any = tokenizer.apply_chat_template(messages, tools, add_generation_prompt=add_generation_prompt)
    ids: list[int] = made["input_ids"]
    return ids


def trained_texts(data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """For each training sequence the text of every stretch of trained tokens."""
    found = []
    for row in data.train:
        stretches: list[list[int]] = [[]]
        for label in row["labels"]:
            if label != -100:
                stretches[-1].append(label)
            elif stretches[-1]:
                stretches.append([])
        found.append([str(tokenizer.decode(ids)) for ids in stretches if ids])
    return found


def prepare_problems(data: DataSection, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> list[str]:
    """What `prepare` refuses, one line per problem, files without their directory."""
    with pytest.raises(DataError) as error:
        prepared(data, tokenizer, **settings)
    assert error.value.exit_code == 3
    return [str(problem).replace(f"{Path(str(data.train[0].path)).parent}/", "") for problem in error.value.problems]


TURNS = "{% for m in messages %}"
CHATML = TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TWO_TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "the answer is one"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "the answer is two ü 😀"},
]
