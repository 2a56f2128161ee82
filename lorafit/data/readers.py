"""The text of a file -> its rows with the lines they start on.

Each reader yields `(line, row)`; what cannot be parsed is reported through `broken(line, message)` and skipped, so that
every problem of a file is found in one go.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from lorafit.data.files import DataFile, FileProblem, decode
from lorafit.data.strict_json import DECODER, json_problem
from lorafit.recipe.sections import Source

Broken = Callable[[int, str], None]
Rows = Iterator[tuple[int, Any]]
HubRows = Callable[[Source], Rows]

_BLANK = re.compile(r"[ \t\n\r]*")


def read_rows(file: DataFile, data: bytes, *, broken: Broken) -> Rows:
    """Rows of one unpacked file.

    Raises FileProblem when nothing of it can be read.
    """
    if file.suffix == ".parquet":
        # pyarrow takes 0.2 s to import: only when a Parquet file is there.
        from lorafit.data.parquet import parquet_rows

        return parquet_rows(data)
    text = decode(data)
    if file.suffix == ".csv":
        return csv_rows(text, broken=broken)
    if file.suffix == ".txt":
        return ((line, {"text": row}) for line, row in enumerate(text.split("\n"), 1) if row.strip())
    # What the file holds decides, not whether it is named .json or .jsonl: the two cannot be mistaken.
    opening = text.lstrip()[:1]
    if opening == "[":
        return json_array_rows(text, broken=broken)
    if opening == "{" and file.suffix == ".json" and _is_one_object_over_lines(text):
        raise FileProblem("is one JSON object, not an array of rows; write [{...}, ...] or one object per line")
    return json_lines_rows(text, broken=broken)


def _is_one_object_over_lines(text: str) -> bool:
    first = text.strip().split("\n", 1)[0]
    try:
        DECODER.decode(first)
    except ValueError:
        try:
            return isinstance(DECODER.decode(text), dict)
        except (ValueError, RecursionError):
            return False
    return False


def json_lines_rows(text: str, *, broken: Broken) -> Rows:
    """One JSON value a line; blank lines are skipped."""
    parse = DECODER.decode
    for line, row in enumerate(text.split("\n"), 1):
        if not row or row.isspace():
            continue
        try:
            yield line, parse(row)
        except (ValueError, RecursionError) as error:
            broken(line, json_problem(error))


def json_array_rows(text: str, *, broken: Broken) -> Rows:
    """The elements of one JSON array, each with the line it starts on."""
    position = text.index("[") + 1
    line, counted = 1, 0
    is_first = True
    while True:
        position = _skip_blank(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            break
        if not is_first:
            if not text.startswith(",", position):
                broken(line, "broken JSON: expected , or ] after an element of the array; what follows was not read")
                return
            position = _skip_blank(text, position + 1)
            line, counted = line + text.count("\n", counted, position), position
        is_first = False
        try:
            row, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            broken(at, f"{json_problem(error)}; what follows was not read")
            return
        yield line, row
    rest = _skip_blank(text, position + 1)
    if rest < len(text):
        broken(line + text.count("\n", counted, rest), "text after the end of the array; remove it")


def _skip_blank(text: str, position: int) -> int:
    blank = _BLANK.match(text, position)
    return blank.end() if blank else position


def csv_rows(text: str, *, broken: Broken) -> Rows:
    """Records of a CSV file with a header, every field as text: nothing is taken for a number or for missing."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = next(reader)
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise FileProblem(f'the column "{twice}" stands twice in the header; rename one', line=1)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            broken(line, f"broken CSV: {error}; check the quotes of this record")
            return
        if not record:
            continue
        if len(record) != len(header):
            broken(line, f"{len(record)} fields where the header has {len(header)}; quote fields that hold commas")
            continue
        yield line, dict(zip(header, record, strict=True))
