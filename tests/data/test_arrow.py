"""What Arrow adds to rows is not learnt: the nulls of keys that only other rows have, maps as lists of pairs."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorafit.data import scan
from lorafit.data.arrow_rows import row_cleaner
from lorafit.data.rows import Chat
from support.sources import rows_of, scanned, section

QUESTION, RESULT, ANSWER = (
    {"role": role, "content": text} for role, text in (("user", "?"), ("tool", "12"), ("assistant", "12."))
)


def chat(name: str, arguments: Any) -> dict[str, Any]:
    """A row with a call of the tool, and its schema with the argument's type."""
    properties = {key: {"type": "string"} for key in arguments} if isinstance(arguments, dict) else {}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}, RESULT, ANSWER],
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}],
    }


def parquet_rows(path: Path, rows: list[dict[str, Any]], schema: pyarrow.Schema | None = None) -> list[Any]:
    """The rows as `scan` has them after they were a Parquet file."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)
    return rows_of(scan(section(path), seed=0))


def test_keys_that_only_other_rows_have_are_no_part_of_a_row_at_any_depth(tmp_path: Path) -> None:
    rows = [chat("weather", {"city": "Rome"}), chat("sum", {"terms": "1 + 1"}), chat("now", {})]
    stored = parquet_rows(tmp_path / "a.parquet", rows)
    for row, found in zip(rows, stored, strict=True):
        assert isinstance(found, Chat)
        assert (found.messages, found.tools) == (row["messages"], row["tools"])


def test_a_null_that_the_user_wrote_stays(tmp_path: Path) -> None:
    row = chat("weather", {"city": None, "day": {"name": None}})
    (found,) = rows_of(scanned(tmp_path / "a.jsonl", json.dumps(row)))
    assert isinstance(found, Chat) and found.messages == row["messages"]


def test_maps_are_objects(tmp_path: Path) -> None:
    text = pyarrow.string()
    function = pyarrow.struct([("name", text), ("arguments", pyarrow.map_(text, text))])
    call = pyarrow.struct([("type", text), ("function", function)])
    message = pyarrow.struct([("role", text), ("content", text), ("tool_calls", pyarrow.list_(call))])
    schema = pyarrow.schema({"messages": pyarrow.list_(message)})
    rows = [chat("weather", {"city": "Rome", "day": None}), chat("now", {})]
    for row, found in zip(rows, parquet_rows(tmp_path / "a.parquet", rows, schema), strict=True):
        assert isinstance(found, Chat) and found.messages == row["messages"]


@pytest.mark.parametrize(
    ("kind", "stored", "expected"),
    [
        (pyarrow.string(), None, None),
        (pyarrow.list_(pyarrow.string()), ["a", None], ["a", None]),
        (pyarrow.list_(pyarrow.struct({"a": pyarrow.string()})), [{"a": None}, None], [{}, None]),
        (pyarrow.json_(), '{"a": null}', {"a": None}),
        (pyarrow.json_(), "{", "{"),
        (pyarrow.list_(pyarrow.json_()), ['{"a": [null]}'], [{"a": [None]}]),
        (pyarrow.map_(pyarrow.string(), pyarrow.struct({"a": pyarrow.string()})), [("k", {"a": None})], {"k": {}}),
    ],
)
def test_only_the_keys_of_structs_are_taken_for_padding(kind: pyarrow.DataType, stored: Any, expected: Any) -> None:
    assert row_cleaner(pyarrow.schema({"x": kind}))({"x": stored}) == {"x": expected}


def test_a_hub_data_set_has_no_padding_either(tmp_path: Path) -> None:
    rows = [chat("weather", {"city": "Rome"}), chat("sum", {"terms": "1 + 1"})]
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    from lorafit.data.hub import HubTables
    from lorafit.recipe.sections import Source

    assert [row for _, row in HubTables().rows(Source(hub=str(tmp_path / "set")), list)] == rows
