"""Files are read as streams: nothing of them is held but a row, whatever its size, and what breaks off is named."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.data import json_array, readers, scan
from lorafit.data.groups import Groups
from lorafit.errors import DataError
from lorafit.recipe.sections import DataSection, Source
from support import ROOT
from support.sources import CHATML, PAIR, json_lines, prepared, rows_of, scan_problems, scanned, section, word_tokenizer
from support.tiny import sums, write_jsonl

# 30 MB of rows, prepared or scanned under a limit of memory that is far below what they take as objects.
MEMORY = """
import resource, sys
from pathlib import Path
from lorafit.data import scan
from lorafit.recipe.sections import DataSection, Source
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
section = DataSection(train=(Source(path=sys.argv[1]),))
before = peak()
found = scan(section, seed=0)
print(found.train_rows, peak() - before)
"""


def measured(path: Path) -> tuple[int, float]:
    """Rows of a file, and the megabytes that scanning it takes."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], check=True, capture_output=True, text=True)
    rows, megabytes = done.stdout.split()
    return int(rows), float(megabytes)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_scanning_holds_no_rows(tmp_path: Path, name: str) -> None:
    text, path = "word " * 200, tmp_path / name
    rows = [{"prompt": str(number), "completion": text} for number in range(30_000)]
    content = {
        "a.jsonl": lambda: json_lines(*rows),
        "a.json": lambda: json.dumps(rows),
        "a.csv": lambda: "prompt,completion\n" + "".join(f"{row['prompt']},{text}\n" for row in rows),
        "a.txt": lambda: "".join(f"{row['prompt']} {text}\n" for row in rows),
        "a.jsonl.gz": lambda: json_lines(*rows),
    }[name]()
    path.write_bytes(gzip.compress(content.encode(), 1) if name.endswith(".gz") else content.encode())
    found, megabytes = measured(path)
    assert found == 30_000 and megabytes < 15


def test_a_row_of_fifty_megabytes_is_read(tmp_path: Path) -> None:
    row = {"prompt": "long", "completion": "x" * 50_000_000}
    found = scanned(tmp_path / "a.jsonl", json_lines(PAIR, row, PAIR))
    assert found.train_rows == 3


def test_an_endless_line_is_named_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(json_lines(PAIR).encode())
        for _ in range(300):
            file.write(b" " * 1_000_000)
    with pytest.raises(DataError) as error:
        scan(section(path), seed=0)
    assert f"{path}:2: is longer than 64 Mi characters" in str(error.value)


@pytest.mark.parametrize(
    ("name", "start"), [("a.txt", "first\n"), ("a.csv", "prompt,completion\na,b\n"), ("a.json", '[{"text": "a"},\n')]
)
def test_what_is_too_long_for_a_row_is_named_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, start: str
) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    monkeypatch.setattr(json_array, "LONGEST_LINE", 1000)
    long = '"' + "x" * 3_000_000
    (problem,) = scan_problems(tmp_path / name, start + long)
    assert problem.startswith(f"{name}:{start.count(chr(10)) + 1}: ") and "longer than 64 Mi characters" in problem


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(values, max_size=6), st.sampled_from([None, 1, "\t"]), st.integers(1, 9), st.booleans())
def test_an_array_is_read_alike_wherever_its_buffers_end(
    rows: list[object], indent: int | str | None, chunk: int, is_ascii: bool
) -> None:
    import io

    text = json.dumps(rows, indent=indent, ensure_ascii=is_ascii)
    stream = io.TextIOWrapper(io.BytesIO(text.encode(errors="replace")), encoding="utf-8", newline="\n")
    before, json_array.CHUNK = json_array.CHUNK, chunk
    broken: list[tuple[int, str]] = []
    try:
        found = list(json_array.json_array_rows(stream, broken=lambda line, message: broken.append((line, message))))
    finally:
        json_array.CHUNK = before
    assert not broken
    assert [row for _, row in found] == json.loads(text.encode(errors="replace"))
    assert [line for line, _ in found] == sorted(line for line, _ in found)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_break_in_an_array_has_the_same_place_wherever_its_buffers_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_array, "CHUNK", chunk)
    rows = '[\n {"prompt": "a", "completion": "b"},\n {"prompt": "a",\n  "completion": tru}\n]'
    assert scan_problems(tmp_path / "a.json", rows) == [
        "a.json:4: broken JSON: Expecting value at column 17; what follows was not read"
    ]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', "a.jsonl: ends its lines with CR alone; convert it: `tr"),
        ("a.txt", b"one\rtwo\r", "a.txt: ends its lines with CR alone"),
        ("a.jsonl", json_lines(PAIR).encode() + b'{"prompt": "\xc3', "a.jsonl:2: ends in the middle of a character"),
        ("a.csv", b"prompt,completion\na,\xe4\n", "a.csv:2: byte 0xe4 is not UTF-8"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "a.json:2: byte 0xff is not UTF-8"),
        ("a.txt", b"x" * 70 + b"\nnul \0 here\n", "a.txt:2: holds a zero byte, which is no text; remove it"),
        ("a.csv", b"prompt,completion\n" + b"a" * 60 + b",\0b\n", "a.csv:2: holds a zero byte"),
        ("a.csv", b"\n\n", "a.csv: holds only blank lines"),
        ("a.txt.gz", gzip.compress(b"line\n" * 9999, mtime=0)[:-20], "a.txt.gz: is not a whole gzip file"),
    ],
)
def test_what_breaks_off_or_is_no_text_is_one_line(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (found,) = scan_problems(tmp_path / name, content)
    assert found.startswith(problem)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_byte_order_marks_and_windows_line_ends_are_no_part_of_a_row(tmp_path: Path, name: str) -> None:
    content = {
        "json": '[{"text": "one"},\r\n{"text": "two"}]',
        "csv": "text\r\none\r\ntwo\r\n",
        "txt": "one\r\ntwo\r\n",
    }
    text = "\ufeff" + content.get(name.split(".")[1], '{"text": "one"}\r\n\ufeff{"text": "two"}\r\n')
    data = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    assert [row.text for row in rows_of(scanned(tmp_path / name, data))] == ["one", "two"]


def test_a_source_of_which_an_epoch_has_no_row_is_refused(tmp_path: Path) -> None:
    one, few = (write_jsonl(tmp_path / f"{name}.jsonl", sums(3, first=n)) for n, name in ((0, "one"), (9, "few")))
    with pytest.raises(DataError) as error:
        scan(DataSection(train=(Source(path=str(one)), Source(path=str(few), weight=0.1))), seed=0)
    assert f"data.train.1: weight 0.1 of 3 rows is none of {few}; raise it to 0.33" in str(error.value)
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(DataError, match=r"none\.json holds no row; take it out"):
        scan(section(one, tmp_path / "none.json"), seed=0)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_files_that_change_between_the_passes_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import pyarrow
    import pyarrow.parquet

    from lorafit.data import prepare as preparing

    path = tmp_path / f"a.{suffix}"

    def write(rows: list[dict[str, str]]) -> None:
        if suffix == "jsonl":
            write_jsonl(path, rows)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    write(sums(5))
    write_tables = preparing.write_tables

    def changed(*arguments: object, **names: object) -> object:
        write(sums(5, first=50))
        return write_tables(*arguments, **names)  # type: ignore[arg-type]

    monkeypatch.setattr(preparing, "write_tables", changed)
    with pytest.raises(DataError, match="the files changed while they were read"):
        prepared(section(path), word_tokenizer(CHATML), cache_dir=tmp_path / "cache")
    assert made_in(tmp_path / "cache") == []


INTERRUPTED = """
import sys, time
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from support.sources import prepared, section, word_tokenizer
from support.sources import CHATML
from lorafit.data import encode
def slowly(scanned):
    for item in rows(scanned):
        print("row", flush=True)
        time.sleep(0.2)
        yield item
rows = encode.DataScan.rows
encode.DataScan.rows = slowly
here = Path(sys.argv[1])
prepared(section(here / "a.jsonl"), word_tokenizer(CHATML), cache_dir=here / "cache")
"""


def made_in(cache: Path) -> list[str]:
    """What lies there, but for the hashes that are remembered of data files."""
    return [entry.name for entry in cache.iterdir() if entry.name != "digests"]


@pytest.mark.parametrize("request_to_stop", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path, request_to_stop: signal.Signals) -> None:
    write_jsonl(tmp_path / "a.jsonl", sums(50))
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), str(ROOT / "tests")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdout is not None and running.stdout.readline() == b"row\n"
        running.send_signal(request_to_stop)
        running.wait(30)
    if request_to_stop == signal.SIGKILL:  # what it left goes with the next one
        assert len(made_in(tmp_path / "cache")) == 1
        made = prepared(section(tmp_path / "a.jsonl"), word_tokenizer(CHATML), cache_dir=tmp_path / "cache")
        (tmp_path / "cache" / made.fingerprint).rename(tmp_path / "entry")
    assert made_in(tmp_path / "cache") == []


def test_a_file_at_rest_is_not_hashed_again_and_one_with_its_time_set_back_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.data import digest

    monkeypatch.setattr(digest, "AT_REST", 10**8)
    path, cache = write_jsonl(tmp_path / "a.jsonl", sums(5)), tmp_path / "cache"
    time.sleep(0.2)
    first = prepared(section(path), word_tokenizer(CHATML), cache_dir=cache)
    opened = []
    whole = digest.DataFile.open

    def open_and_note(file: digest.DataFile) -> Any:
        opened.append(file.name)
        return whole(file)

    monkeypatch.setattr(digest.DataFile, "open", open_and_note)
    assert prepared(section(path), word_tokenizer(CHATML), cache_dir=cache).fingerprint == first.fingerprint
    assert opened == []
    stat = path.stat()
    path.write_text(path.read_text().replace("It is", "It iz"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert prepared(section(path), word_tokenizer(CHATML), cache_dir=cache).fingerprint != first.fingerprint


def test_a_file_that_was_just_written_is_not_trusted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sums(5))
    prepared(section(path), word_tokenizer(CHATML), cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "digests").exists()


@given(st.lists(st.sampled_from("abcdefgh")))
def test_groups_tell_the_first_row_of_the_same_content(rows: list[str]) -> None:
    groups = Groups()
    for row in rows:
        groups.add((row,))
    assert list(groups.firsts()) == [rows.index(row) for row in rows]
