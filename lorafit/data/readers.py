"""A file -> its rows with the lines they start on, one after the other.

Each reader yields `(line, row)`; what cannot be parsed is reported through `broken(line, message)` and skipped, so that
every problem of a file is found in one go. What makes the rest of a file unreadable is a FileProblem.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import count
from typing import Any

from lorafit.data.json_array import json_array_rows
from lorafit.data.source_files import DataFile, FileProblem
from lorafit.data.streams import LONGEST_LINE, TOO_LONG, Hash, content, not_utf8, refuse_what_is_no_text
from lorafit.data.strict_json import DECODER, json_problem
from lorafit.recipe.sections import Source

Broken = Callable[[int, str], None]
Rows = Iterator[tuple[int, Any]]
Needed = Callable[[Iterable[str]], list[str]]
"""Which of the columns that are there need be read."""
HubRows = Callable[[Source, Needed], Rows]

BOM = "\ufeff"


def read_rows(
    file: DataFile, *, broken: Broken, needed: Needed, hashed: Hash | None = None
) -> Generator[tuple[int, Any], None, None]:
    """The rows of one file. Files that store columns apart are asked only for those that are `needed`.

    `hashed` takes the bytes of a file that is read from its beginning to its end. Raises FileProblem, at any row.
    """
    if file.suffix in (".parquet", ".arrow"):
        # pyarrow takes 0.2 s to import: only when such a file is there.
        from lorafit.data.parquet import parquet_rows

        yield from parquet_rows(file, needed)
        return
    with content(file, hashed=hashed) as stream:
        try:
            yield from _text_rows(file, stream, broken)
        except UnicodeDecodeError:
            raise not_utf8(file) from None


def _text_rows(file: DataFile, stream: io.BufferedReader[Any], broken: Broken) -> Rows:
    head = stream.peek(1)
    refuse_what_is_no_text(head)
    opening = head.removeprefix(BOM.encode()).lstrip()[:1]
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="" if file.suffix == ".csv" else "\n")
    try:
        if file.suffix == ".csv":
            yield from csv_rows(text, broken=broken)
        # What the file holds decides, not whether it is named .json or .jsonl: the two cannot be mistaken.
        elif file.suffix != ".txt" and opening == b"[":
            yield from json_array_rows(text, broken=broken)
        elif b"\r" in head[:-1] and b"\n" not in head:
            raise FileProblem("ends its lines with CR alone; convert it: `tr '\\r' '\\n' < FILE > NEW`")
        elif file.suffix == ".txt":
            yield from text_rows(text, broken=broken)
        else:
            yield from json_lines_rows(text, broken=broken, file=file)
    finally:
        text.detach()  # the stream is closed by who opened it


def numbered_lines(text: io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    """Every line that is not blank, with its number, without its end and without a byte order mark before it.

    Raises FileProblem for a line that is too long, and when all are blank.
    """
    is_blank = True
    for number in count(1):
        line = text.readline(LONGEST_LINE)
        if not line:
            break
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            raise FileProblem(TOO_LONG, line=number)
        # Files that were joined may hold a mark at the beginning of each.
        line = line.removesuffix("\n").removesuffix("\r").removeprefix(BOM)
        if line and not line.isspace():
            is_blank = False
            yield number, line
    if is_blank:
        raise FileProblem("holds only blank lines; write the rows into it")


def text_rows(text: io.TextIOWrapper, *, broken: Broken) -> Rows:
    """One row a line."""
    for number, line in numbered_lines(text):
        if "\0" in line:
            broken(number, "holds a zero byte, which is no text; remove it")
        else:
            yield number, {"text": line}


def json_lines_rows(text: io.TextIOWrapper, *, broken: Broken, file: DataFile) -> Rows:
    """One JSON value a line."""
    parse = DECODER.decode
    is_first = True
    for number, line in numbered_lines(text):
        try:
            yield number, parse(line)
        except (ValueError, RecursionError) as error:
            if is_first and file.suffix == ".json" and line.lstrip().startswith("{") and _is_one_object(file):
                message = "is one JSON object, not an array of rows; write [{...}, ...] or one object per line"
                raise FileProblem(message) from None
            broken(number, json_problem(error))
        is_first = False


def _is_one_object(file: DataFile) -> bool:
    with content(file) as stream:
        try:
            return isinstance(DECODER.decode(stream.read(LONGEST_LINE).decode("utf-8-sig")), dict)
        except (ValueError, RecursionError):
            return False


def csv_rows(text: io.TextIOWrapper, *, broken: Broken) -> Rows:
    """Records of a CSV file with a header, every field as text: nothing is taken for a number or for missing."""
    csv.field_size_limit(LONGEST_LINE)
    lines = _csv_lines(text)
    reader = csv.reader(lines, strict=True)
    header = next(reader, None)
    while header == []:  # a blank line
        header = next(reader, None)
    if header is None:
        raise FileProblem("holds only blank lines; write the rows into it")
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise FileProblem(f'the column "{twice}" stands twice in the header; rename one', line=reader.line_num)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            is_long = "field larger than field limit" in str(error)
            broken(line, TOO_LONG if is_long else f"broken CSV: {error}; check the quotes of this record")
            return
        if not record:
            continue
        if len(record) != len(header):
            broken(line, f"{len(record)} fields where the header has {len(header)}; quote fields that hold commas")
            continue
        if any("\0" in field for field in record):
            broken(line, "holds a zero byte, which is no text; remove it")
            continue
        yield line, dict(zip(header, record, strict=True))


def _csv_lines(text: io.TextIOWrapper) -> Iterator[str]:
    for number in count(1):
        line = text.readline(LONGEST_LINE)
        if not line:
            return
        if len(line) == LONGEST_LINE and not line.endswith(("\n", "\r")):
            raise FileProblem(TOO_LONG, line=number)
        yield line
