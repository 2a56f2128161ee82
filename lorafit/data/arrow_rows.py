"""Rows of Arrow tables without what the tables add: a struct has a null for every key that only other rows have.

`{"city": "Paris"}` beside `{"expr": "2+2"}` is stored as `{"city": "Paris", "expr": null}`, and a chat template would
write the null into the prompt. In JSON columns, and as the values of maps, a null is the user's and stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow

from lorafit.data.strict_json import DECODER

Clean = Callable[[Any], Any]
LISTS = (
    pyarrow.ListType,
    pyarrow.LargeListType,
    pyarrow.FixedSizeListType,
    pyarrow.ListViewType,
    pyarrow.LargeListViewType,
)


def row_cleaner(schema: pyarrow.Schema) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What turns a row of such a table, as Python objects, into the row that was stored."""
    cleaners = {field.name: clean for field in schema if (clean := _cleaner(field.type))}

    def clean_row(row: dict[str, Any]) -> dict[str, Any]:
        for name, clean in cleaners.items():
            if row.get(name) is not None:
                row[name] = clean(row[name])
        return row

    return clean_row


def _cleaner(kind: pyarrow.DataType) -> Clean | None:
    """What turns one value of this type that is not null into what was stored; None where it already is that."""
    if isinstance(kind, pyarrow.JsonType):
        return _parsed
    if pyarrow.types.is_struct(kind):
        return _struct_cleaner({field.name: _cleaner(field.type) for field in kind.fields})
    if pyarrow.types.is_map(kind):
        return _map_cleaner(_cleaner(kind.item_type))
    clean_item = _cleaner(kind.value_type) if isinstance(kind, LISTS) else None
    if clean_item is None:
        return None
    return lambda items: [item if item is None else clean_item(item) for item in items]


def _struct_cleaner(cleaners: dict[str, Clean | None]) -> Clean:
    def clean(struct: Any) -> Any:
        if not isinstance(struct, dict):  # what `datasets` has decoded already, a picture for one
            return struct
        kept = {}
        for key, value in struct.items():
            if value is not None:
                clean_value = cleaners.get(key)
                kept[key] = clean_value(value) if clean_value else value
        return kept

    return clean


def _map_cleaner(clean_value: Clean | None) -> Clean:
    def clean(pairs: Any) -> Any:
        # A key that stands twice stays visible as a list of pairs, and is refused as no object.
        if isinstance(pairs, dict) or len(dict(pairs)) != len(pairs):
            return pairs
        return {key: clean_value(value) if clean_value and value is not None else value for key, value in pairs}

    return clean


def _parsed(text: Any) -> Any:
    """JSON columns come as text from Arrow, and parsed from `datasets`."""
    if not isinstance(text, str):
        return text
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return text
