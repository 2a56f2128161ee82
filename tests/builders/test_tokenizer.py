"""The tokenizer: padding settled, end of text there, its ids within the embedding."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafit.builders.tokenizer import load_tokenizer
from lorafit.errors import ModelError
from lorafit.recipe.sections import ModelSection
from support.tiny import byte_tokenizer


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to break."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def section(directory: Path) -> ModelSection:
    return ModelSection(model_name_or_path=str(directory))


def rename_padding(directory: Path, name: str) -> None:
    """A tokenizer that names no padding token; what was `<|pad|>` is called `name`."""
    for path in directory.glob("tokenizer*.json"):
        path.write_text(path.read_text().replace("<|pad|>", name))
    path = directory / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    del facts["pad_token"]
    path.write_text(json.dumps(facts))


def test_the_tokenizers_own_padding_stays(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(section(tiny_base))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer("Grüße, 世界")["input_ids"]) == "Grüße, 世界"
    assert tokenizer.chat_template == byte_tokenizer().chat_template


@pytest.mark.parametrize("name", ["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<unk>"])
def test_a_token_that_no_text_contains_pads_where_none_is_named(copied: Path, name: str) -> None:
    rename_padding(copied, name)
    tokenizer = load_tokenizer(section(copied))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (name, 0)
    assert len(tokenizer) == len(byte_tokenizer())


def test_the_end_of_text_pads_where_there_is_nothing_else_and_that_is_said(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rename_padding(copied, "<|first|>")
    with caplog.at_level(logging.WARNING, logger="lorafit"):
        assert load_tokenizer(section(copied)).pad_token == "<|im_end|>"
    assert [record.getMessage() for record in caplog.records] == [
        f"{copied}: has no padding token; padding with <|im_end|>"
    ]


def test_the_end_of_text_is_not_taken_for_a_padding_token_by_its_name(copied: Path) -> None:
    rename_padding(copied, "<pad>")
    for path in copied.glob("tokenizer*.json"):
        path.write_text(path.read_text().replace("<pad>", "<unk>").replace("<|im_end|>", "<pad>"))
    tokenizer = load_tokenizer(section(copied))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<pad>", "<unk>")


def without_end(base: Path) -> None:
    facts = json.loads((base / "tokenizer_config.json").read_text())
    del facts["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(facts))


def embedding_of(rows: int) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        facts = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(facts | {"vocab_size": rows}))

    return change


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no end of text": (without_end, 'the tokenizer has no end-of-text token: write "eos_token": "..." in'),
    "broken JSON": (
        lambda base: (base / "tokenizer.json").write_text('{"version": '),
        "/tokenizer.json: is not JSON (",
    ),
    "no tokenizer in the file": (
        lambda base: (base / "tokenizer.json").write_text('{"version": "1.0"}'),
        ": its tokenizer cannot be read: ",
    ),
    "no files": (
        lambda base: list(map(Path.unlink, base.glob("tokenizer*"))),
        ": has no tokenizer: copy its files there (tokenizer.json, tokenizer_config.json)",
    ),
    "another model's": (
        embedding_of(200),
        "the tokenizer is not this model's: it has 259 tokens, the embedding has 200 rows",
    ),
    "special tokens outside": (
        embedding_of(2),
        "eos_token '<|im_end|>' is id 2, it has 259 tokens, the embedding has 2",
    ),
}
assert len(BREAKS) == 6


@pytest.mark.parametrize("name", BREAKS)
def test_an_unusable_tokenizer_is_refused_in_one_line_with_the_mend(copied: Path, name: str) -> None:
    break_it, expected = BREAKS[name]
    break_it(copied)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(section(copied))
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(copied))
    assert expected in line


def test_added_tokens_outside_the_embedding_are_left_to_the_audit_of_the_data(copied: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<image_{index}>" for index in range(20)])
    tokenizer.save_pretrained(copied)
    assert len(load_tokenizer(section(copied))) == 279


def test_a_doubted_mistral_splitting_rule_is_said(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"model_type": "mistral", "transformers_version": "4.40.0", "vocab_size": 100_300}
    facts = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(facts | changes))
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {
        f"<{index}>": index for index in range(259, 100_300)
    }  # only large ones are looked at
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    with caplog.at_level(logging.WARNING, logger="lorafit"):
        load_tokenizer(section(copied))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lorafit")]
    assert len(said) == 1 and "splits text otherwise than the Mistral model was trained with" in said[0]
