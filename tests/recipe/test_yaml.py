"""YAML as a recipe reads it: 1.2 core scalars, true places, no trap."""

import os
import time
from pathlib import Path

import pytest
import yaml

from lorafit.errors import RecipeError
from lorafit.recipe.yaml_reader import MAX_BYTES, Document, Spot, parse, plain_value, read_file


def said(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, name="x")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("3.", 3.0),
        ("-1", -1),
        ("017", 17),
        ("0o17", 15),
        ("0xff", 255),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("null", None),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("1e", "1e"),
        ("=", "="),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read = plain_value(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", [".inf", "-.INF", ".nan", "1e999", "9" * 200, "9" * 5000, str(2**63)])
def test_numbers_that_are_not_finite_are_refused(text: str) -> None:
    assert said(f"a: 1\nb: {text}\n")[0].startswith("x:2:4: ")


def test_quoted_scalars_are_text() -> None:
    document = parse("a: '2e-4'\nb: \"true\"\nc: |\n  1\n", name="x")
    assert document.value == {"a": "2e-4", "b": "true", "c": "1\n"}


def test_every_key_and_value_knows_its_line_and_column() -> None:
    document = parse("a:\n  b: [1, {c: 2}]\nd: x\n", name="x")
    assert document.keys == {
        ("a",): Spot(1, 1),
        ("a", "b"): Spot(2, 3),
        ("a", "b", 1, "c"): Spot(2, 11),
        ("d",): Spot(3, 1),
    }
    assert document.values[("a", "b", 0)] == Spot(2, 7)
    assert document.values[("a", "b", 1, "c")] == Spot(2, 14)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "x:3:1: the key a again (first on line 1); keep one"),
        ("a: &x 1\n", "x:1:4: the anchor &x; write values out (or share them through `extends`)"),
        ("a: *x\n", "x:1:4: the alias *x; write the value out (or share it through `extends`)"),
        ("a: !!str 1\n", "x:1:4: the tag !!str; write the bare value, in quotes if it is text"),
        ("a: !!python/object/apply:os.system [ls]\n", "x:1:4: the tag !!python/object/apply:os.system; write the bare"),
        ("a:\n\tb: 1\n", "x:2:1: a tab in the indentation; YAML is indented with spaces"),
        ("<<: {a: 1}\n", "x:1:1: the merge key <<"),
        ("a: 1\n---\nb: 2\n", "x:2:1: a second document (`---`)"),
        ("1: a\n", 'x:1:1: the key 1 is not text; write it in quotes: "1"'),
        ("? [a]\n: 1\n", "x:1:3: a key that is not text"),
        ("a: b: c\n", "x:1:5: a second `: ` in one value"),
        ("a: 'x\n", "x:1:4: a quote that is not closed"),
        ("a: [1, 2\n", "x:1:4: a bracket that is not closed"),
        ("a: @x\n", "x:1:4: text that starts with @"),
        ("a: 1\nb\nc: 2\n", "x:2:1: a line without `key: value`"),
        ("a: x\0y\n", "x:1:5: the unprintable character U+0000"),
        ('a: "x\\0y"\n', "x:1:4: text with the unprintable character U+0000"),
        ("a: 1\n  b: 2\n", "x:2:4: a second `: ` in one value"),
    ],
)
def test_traps_are_refused_with_their_place(text: str, line: str) -> None:
    assert said(text)[0].startswith(line)


def test_every_duplicate_is_named_at_once() -> None:
    assert [line[:5] for line in said("a: 1\na: 2\nb: {c: 1, c: 2}\n")] == ["x:2:1", "x:3:1"]


@pytest.mark.parametrize("bomb", ["[" * 100_000, "{a: " * 100_000, "- " * 10_000, "? " * 10_000, "{" * 10_000])
def test_depth_bombs_are_refused_quickly(bomb: str) -> None:
    started = time.perf_counter()
    assert "nested deeper than 32 levels" in " ".join(said(bomb))
    assert time.perf_counter() - started < 2


def test_an_alias_bomb_is_refused_before_it_unfolds() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    assert len(said(bomb)) == 9 + 16


def test_the_python_parser_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: 2e-4\nb: [no, 'x', {c: ~}]\n"
    fast: Document = parse(text, name="x")
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    assert parse(text, name="x") == fast
    assert said("a: 1\na: 2\n") == ["x:2:1: the key a again (first on line 1); keep one"]


def file_said(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        read_file(path)
    (problem,) = caught.value.problems
    assert problem.where.startswith(str(path))
    return problem.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "is not a mapping"),
        (b"just text\n", "is not a mapping"),
        (b"\xef\xbb\xbfa: 1\n", "starts with a byte order mark"),
        ("a: 1\n".encode("utf-16"), "starts with a byte order mark"),
        (b"a: 1\nb: \xff\n", "is not UTF-8 text (byte 0xff)"),
        (b"\x7fELF\x02\x01\x01\x00", "the unprintable character U+007F; delete it"),
        (b"a: 1\n" + b"#" * 2_000_000, "has 2,000,005 bytes; a recipe has at most 1,000,000"),
    ],
)
def test_what_is_not_a_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    assert file_said(path).startswith(message)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert file_said(tmp_path) == "is a directory; give the recipe file in it"
    assert file_said(tmp_path / "pipe.yaml").startswith("is not a file (a pipe")
    assert file_said(Path("/dev/zero")).startswith("is not a file (a pipe")
    assert file_said(tmp_path / "loop.yaml").startswith("cannot be read")
    assert file_said(tmp_path / "absent.yaml") == "no such file"
    assert file_said(tmp_path / ("x" * 300)).startswith("cannot be read")


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: 1\n".ljust(MAX_BYTES, b"\n"))
    assert read_file(path).value == {"a": 1}
