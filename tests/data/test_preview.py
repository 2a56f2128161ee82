"""`lorafit preview` shows rows as tokens, as text, in colour, as JSON and as a page."""

import html
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafit.cli import _exit_code
from lorafit.data.preview import Preview, preview, token_views
from lorafit.report.preview import preview_page, preview_text
from support.sources import CHATML, prepared, section, word_tokenizer
from support.tiny import byte_tokenizer, write_jsonl

ROWS = [{"prompt": "the question", "completion": "two ü \x1b[31m"}, {"prompt": "is", "completion": "<b>one</b>"}]


def view(tmp_path: Path, *, rows: int = 3) -> Preview:
    tokenizer = word_tokenizer(CHATML)
    data = prepared(section(write_jsonl(tmp_path / "a.jsonl", ROWS)), tokenizer)
    return preview(data, tokenizer, stop_token_ids=frozenset({tokenizer.eos_token_id}), rows=rows)


def test_trained_tokens_are_in_brackets_and_the_stop_token_in_double_ones(tmp_path: Path) -> None:
    text = preview_text(view(tmp_path, rows=1), in_colour=False)
    assert "| question|<|im_end|>|↵\n|" in text
    assert "[[<|im_end|>]][↵\n]" in text
    assert "generation stops on <|im_end|>" in text
    assert "a.jsonl:1: " in text and "a.jsonl:2: " not in text
    assert "2 rows, " in text and "99 %" in text


def test_the_trained_text_reads_on_across_its_tokens(tmp_path: Path) -> None:
    row = view(tmp_path).rows[0]
    assert "".join(token.text for token in row.tokens if token.is_trained) == ROWS[0]["completion"] + "<|im_end|>\n"
    assert "".join(token.text for token in row.tokens).startswith("<|im_start|>user\nthe question<|im_end|>")


def test_bytes_of_one_character_are_shown_together() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("aü😀b")["input_ids"]
    views = token_views(ids, [-100, *ids[1:]], tokenizer, frozenset())
    assert [(token.text, len(token.ids)) for token in views] == [("a", 1), ("ü", 2), ("😀", 4), ("b", 1)]


def test_the_space_a_token_begins_with_is_shown() -> None:
    core = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1}))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.decode([1]) == "two"
    assert [token.text for token in token_views([0, 1], [0, 1], tokenizer, frozenset())] == ["one", " two"]


def test_data_cannot_steer_the_terminal(tmp_path: Path) -> None:
    plain = preview_text(view(tmp_path), in_colour=False)
    assert "\x1b" not in plain and "\\x1b" in plain
    assert set(re.findall("\x1b[^m]*m", preview_text(view(tmp_path), in_colour=True))) == {
        "\x1b[32m",
        "\x1b[2m",
        "\x1b[1;7;32m",
        "\x1b[0m",
    }


def test_the_page_needs_no_other_file_and_escapes_the_data(tmp_path: Path) -> None:
    page = preview_page(view(tmp_path))
    assert "<b>one</b>" in html.unescape(re.sub("<[^>]+>", "", page))
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert page.count('class="row"') == 3  # two rows and the legend


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("lorafit.data.cache.cache_directory", lambda: tmp_path / "cache")
    write_jsonl(tmp_path / "a.jsonl", [*ROWS, ROWS[0]])
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{model_name_or_path: {tiny_base}}}\ndata:\n  train:\n    - path: a.jsonl\n")
    return path


def test_the_command_prints_rows_and_says_warnings_apart(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["preview", str(recipe), "--rows", "1"]) == 0
    said = capsys.readouterr()
    assert "[t][w][o]" in said.out and "duplicates" not in said.out
    assert said.err.startswith("warning: rows that are duplicates of earlier ones: 1, at ")


def test_the_command_prints_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["preview", str(recipe), "--rows", "1", "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert said.err == ""
    assert len(result["rows"]) == 1 and result["audit"]["train"]["rows"] == 3
    assert [token["text"] for token in result["rows"][0]["tokens"] if token["is_stop"]] == ["<|im_end|>"]


def test_the_command_writes_a_page(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = recipe.parent / "page.html"
    assert _exit_code(["preview", str(recipe), "--html", str(page)]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert capsys.readouterr().out == f"{page}: open it in a browser\n"


def test_the_command_needs_no_weights(recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    recipe.write_text(recipe.read_text().replace(str(tiny_base), str(bare)))
    assert _exit_code(["preview", str(recipe)]) == 0


def test_bad_data_ends_with_exit_code_3(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(recipe.parent / "a.jsonl", [{"prompt": 3, "completion": "x"}])
    assert _exit_code(["preview", str(recipe)]) == 3
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert re.fullmatch(r"error: .*a\.jsonl:1: prompt: a number \(3\) where text belongs; write it as text\n", said.err)
