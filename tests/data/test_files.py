"""Files of every kind become rows with true lines; what is wrong with a file is said in one line."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lorafit.data import scan
from lorafit.errors import DataError
from support.sources import PAIR, json_lines, rows_of, scan_problems, scanned, section

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}.\nReally."} for i in range(3)]


def csv_text(rows: list[dict[str, str]]) -> str:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def parquet_bytes(rows: list[dict[str, str]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


CONTENTS = {
    ".jsonl": json_lines(*ROWS).encode(),
    ".json": json.dumps(ROWS, indent=2).encode(),
    ".csv": csv_text(ROWS).encode(),
    ".parquet": parquet_bytes(ROWS),
}
FIRST_LINES = {".jsonl": [1, 2, 3], ".json": [2, 6, 10], ".csv": [2, 4, 6], ".parquet": [1, 2, 3]}


@pytest.mark.parametrize("suffix", CONTENTS)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_every_kind_of_file_gives_its_rows_with_true_lines(tmp_path: Path, suffix: str, is_compressed: bool) -> None:
    content = gzip.compress(CONTENTS[suffix]) if is_compressed else CONTENTS[suffix]
    found = scanned(tmp_path / f"rows{suffix}{'.gz' if is_compressed else ''}", content)
    assert [(row.prompt, row.completion) for row in rows_of(found)] == [
        (row["prompt"], row["completion"]) for row in ROWS
    ]
    assert [row.place for row in rows_of(found)] == [(0, line) for line in FIRST_LINES[suffix]]


def test_a_text_file_is_one_row_a_line_without_blank_ones(tmp_path: Path) -> None:
    found = scanned(tmp_path / "rows.txt", "first\n\n  \nfourth, with \u2028 inside\n")
    assert [(row.text, row.place[1]) for row in rows_of(found)] == [("first", 1), ("fourth, with \u2028 inside", 4)]


def test_a_directory_is_read_in_order_and_what_is_no_data_is_named(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/10.jsonl", "c.jsonl.gz", "README.md", ".hidden/x.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = json_lines({"prompt": name, "completion": "x"}).encode()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = scan(section(tmp_path), seed=0)
    assert [row.prompt for row in rows_of(found)] == ["a/10.jsonl", "b/2.jsonl", "c.jsonl.gz"]
    assert len(found.warnings) == 1 and "README.md" in found.warnings[0]


def test_a_glob_takes_the_files_it_matches_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        (tmp_path / name).write_text(json_lines({"prompt": name, "completion": "x"}))
    found = scan(section(tmp_path / "*.jsonl"), seed=0)
    assert [row.prompt for row in rows_of(found)] == ["a.jsonl", "b.jsonl"]


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*\.jsonl: matches no file"):
        scan(section(tmp_path / "*.jsonl"), seed=0)


def test_a_directory_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory without data files"):
        scan(section(tmp_path), seed=0)


def test_json_lines_named_json_and_an_array_named_jsonl_are_read_as_what_they_are(tmp_path: Path) -> None:
    assert len(rows_of(scanned(tmp_path / "rows.json", CONTENTS[".jsonl"]))) == 3
    assert len(rows_of(scanned(tmp_path / "rows.jsonl", CONTENTS[".json"]))) == 3


def test_csv_fields_stay_text(tmp_path: Path) -> None:
    found = scanned(tmp_path / "rows.csv", 'prompt,completion\nNA,007\n"a ""b"", c",1e5\n')
    assert [(row.prompt, row.completion) for row in rows_of(found)] == [("NA", "007"), ('a "b", c', "1e5")]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_rows(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json_lines(*ROWS).replace("\n", "\r\n").encode()
    assert rows_of(scanned(tmp_path / "rows.jsonl", content))[0].prompt == "What is 0?"


def test_a_limit_reads_no_more_than_it_says_across_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text(json_lines(*ROWS))
    (tmp_path / "c.jsonl").write_text("broken")
    found = scan(section(tmp_path, source={"limit": 4}), seed=0)
    assert [row.place for row in rows_of(found)] == [(0, 1), (0, 2), (0, 3), (1, 1)]
    assert len(found.files) == 3


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b"", "a.jsonl: is empty; remove it from the recipe, or write the rows into it"),
        ("a.jsonl", b" \n\n", "a.jsonl: holds only blank lines; write the rows into it"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "a.jsonl: is a Git LFS pointer, not the data; fetch it with `git lfs pull`",
        ),
        (
            "a.jsonl",
            gzip.compress(b"{}", mtime=0),
            "a.jsonl: is compressed with gzip but not named so; rename it to end in .gz",
        ),
        (
            "a.jsonl.gz",
            b"{}\n",
            "a.jsonl.gz: is not a whole gzip file (Not a gzipped file (b'{}')); compress or download it again",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}" * 99, mtime=0)[:-9],
            "a.jsonl.gz: is not a whole gzip file (Compressed file ended before the end-of-stream marker was reached); "
            "compress or download it again",
        ),
        (
            "a.json",
            b"\n<!DOCTYPE html><html>",
            "a.json: is an HTML page, not data; download the file itself (the raw link)",
        ),
        ("a.jsonl", parquet_bytes(ROWS), "a.jsonl: is a Parquet file; rename it to end in .parquet"),
        (
            "a.jsonl",
            '{"prompt": "ä"}'.encode("utf-16"),
            "a.jsonl: is UTF-16 text; convert it: `iconv -f UTF-16 -t UTF-8`",
        ),
        (
            "a.jsonl",
            '{"prompt": "ä"}'.encode("utf-16-le"),
            "a.jsonl: is not UTF-8 text (it holds zero bytes: UTF-16, or binary); convert it: `iconv -t UTF-8`",
        ),
        (
            "a.jsonl",
            b'{}\n{"prompt": "\xe4"}',
            "a.jsonl:2: byte 0xe4 is not UTF-8; convert the file: `iconv -f LATIN1 -t UTF-8`",
        ),
        (
            "a.json",
            b'{\n"rows": []\n}',
            "a.json: is one JSON object, not an array of rows; write [{...}, ...] or one object per line",
        ),
        (
            "a.csv",
            b"prompt,prompt\n1,2\n",
            'a.csv:1: the column "prompt" stands twice in the header; rename one',
        ),
        (
            "a.csv",
            b'prompt,completion\n1,2\n"open,3\n4,5\n',
            "a.csv:3: broken CSV: unexpected end of data; check the quotes of this record",
        ),
        (
            "a.csv",
            b'prompt,completion\n"1\n",2\n1,2,3\n',
            "a.csv:4: 3 fields where the header has 2; quote fields that hold commas",
        ),
        ("a.tsv", b"prompt\tcompletion\n", "a.tsv: is not a kind of file that can be read"),
        ("a.parquet", b"PAR1 cut short", "a.parquet: is not a whole Parquet file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    problems = scan_problems(tmp_path / name, content)
    assert len(problems) == 1
    assert problems[0] == problem or (len(problem) < 60 and problems[0].startswith(problem))


def test_a_missing_file_is_refused_with_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json_lines(PAIR))
    with pytest.raises(DataError, match=r"trian\.jsonl: does not exist; did you mean train\.jsonl\?"):
        scan(section(tmp_path / "trian.jsonl"), seed=0)


def test_a_link_to_nothing_is_not_taken_for_a_misspelt_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("moved.jsonl")
    with pytest.raises(
        DataError, match=r"rows\.jsonl: does not exist: it is a link to moved\.jsonl, where there is no"
    ):
        scan(section(tmp_path / "rows.jsonl"), seed=0)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="is not a regular file"):
        scan(section(tmp_path / "rows.jsonl"), seed=0)


def test_broken_json_is_named_by_its_line_in_a_long_file(tmp_path: Path) -> None:
    lines = [json.dumps(PAIR)] * 200_000
    lines[123_455] = '{"prompt": "One?", "completion"'
    assert scan_problems(tmp_path / "a.jsonl", "\n".join(lines)) == [
        "a.jsonl:123456: broken JSON: Expecting ':' delimiter at column 32"
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "prompt": "b"}', 'the key "prompt" stands twice in one object; keep one'),
        ('{"prompt": NaN, "completion": "b"}', "NaN is not JSON; write a number, null or text"),
        ('{"prompt": -Infinity}', "-Infinity is not JSON; write a number, null or text"),
        ('{"prompt": [1.5, -1e999]}', "-1e999 is beyond what a number can hold; write it as text"),
        ('{"prompt": ' + "9" * 5000 + "}", "a number with thousands of digits; write it as text"),
        ("[" * 100_000, "broken JSON: nested too deeply"),
        ('{"prompt": "a', "broken JSON: Unterminated string starting at column 12"),
        ('{"prompt": "a"} {"prompt": "b"}', "broken JSON: Extra data at column 17"),
    ],
)
def test_what_json_does_not_allow_is_refused_with_its_line(tmp_path: Path, line: str, problem: str) -> None:
    content = f"{json.dumps(PAIR)}\n{line}\n{json.dumps(PAIR)}\n"
    assert scan_problems(tmp_path / "a.jsonl", content) == [f"a.jsonl:2: {problem}"]


def test_a_break_inside_an_array_is_named_by_its_line(tmp_path: Path) -> None:
    content = '[\n {"prompt": "a",\n  "completion": "b"},\n {"prompt": "a" "completion": "b"}\n]'
    assert scan_problems(tmp_path / "a.json", content) == [
        "a.json:4: broken JSON: Expecting ',' delimiter at column 17; what follows was not read"
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"prompt": "a", "completion": "b"}\n {"a": 1}]', "a.json:2: broken JSON: expected , or ] after an element"),
        ('[{"prompt": "a", "completion": "b"}]\n\nmore', "a.json:3: text after the end of the array; remove it"),
        ('[{"prompt": "a", "completion": "b"},\n', "a.json:2: broken JSON: Expecting value"),
    ],
)
def test_an_array_must_be_whole(tmp_path: Path, content: str, problem: str) -> None:
    assert scan_problems(tmp_path / "a.json", content)[0].startswith(problem)


def test_the_first_twenty_of_a_kind_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    problems = scan_problems(tmp_path / "a.jsonl", "nonsense\n" * 50)
    assert len(problems) == 21
    assert problems[19].startswith("a.jsonl:20: broken JSON")
    assert problems[20] == "a.jsonl: and 30 more like this (rows that cannot be parsed)"


def test_problems_of_all_files_are_reported_at_once_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    (tmp_path / "b.jsonl").write_text(json_lines({"prompt": None, "completion": "x"}))
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(DataError) as error:
        scan(section(tmp_path / "c.jsonl", tmp_path / "b.jsonl", tmp_path / "a.jsonl"), seed=0)
    assert [Path(problem.where.split(":")[0]).name for problem in error.value.problems] == [
        "c.jsonl",
        "b.jsonl",
        "a.jsonl",
    ]


def test_scan_loads_neither_torch_nor_datasets_and_is_quick(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json_lines(*({"prompt": f"{i}?", "completion": f"{i}."} for i in range(1000))))
    program = (
        "import sys, time\n"
        "from lorafit.data import scan\n"
        "from lorafit.recipe.sections import DataSection, Source\n"
        f"section = DataSection(train=(Source(path={str(path)!r}),))\n"
        "start = time.process_time()\n"
        "assert scan(section, seed=0).train_rows == 1000\n"
        "assert time.process_time() - start < 0.2\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'trl', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_hundred_thousand_rows_are_read_in_seconds(tmp_path: Path) -> None:
    content = "".join(f'{{"prompt": "What is {i}?", "completion": "It is {i}."}}\n' for i in range(100_000))
    start = time.process_time()
    assert scanned(tmp_path / "rows.jsonl", content).train_rows == 100_000
    assert time.process_time() - start < 5
