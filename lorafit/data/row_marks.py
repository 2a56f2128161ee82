"""Columns by which a row says what of it is learnt, or how: obeyed, or refused with what to write instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorafit.data.problems import RowProblem, shown
from lorafit.data.tool_calls import parsed

WEIGHTS = frozenset(("weight", "sample_weight", "loss_weight"))
TEMPLATE_KWARGS = frozenset(("chat_template_kwargs", "template_kwargs"))
PREFERENCE = frozenset(("label", "kto_tag"))
TRAINED = frozenset(("train",))
TOKENS = frozenset(("input_ids", "labels", "loss_mask", "mask", "completion_mask", "assistant_mask", "assistant_masks"))
ROW_MARKS = WEIGHTS | TEMPLATE_KWARGS | PREFERENCE | TRAINED | TOKENS


def refuse_mark(column: str, value: Any, *, template_kwargs: Mapping[str, Any], has_own_format: bool) -> None:
    """Raises RowProblem for a value that would change what is learnt, if it were read.

    `has_own_format`: the recipe says which columns are meant, so that tokens beside the text are left out on purpose.
    """
    value = _as_meant(value)
    if column in WEIGHTS and isinstance(value, int | float) and not isinstance(value, bool) and value != 1:
        raise RowProblem(
            f"{column}: {shown(value)}, but sources have weights, not rows; put the rows of one weight into a file of "
            f"their own and write weight: beside its path, or remove the column",
            kind="unobeyed",
        )
    if column in TRAINED and value is False:
        message = f"{column}: {shown(value)} on a whole row; remove the row, or mark messages with train: false"
        raise RowProblem(message, kind="unobeyed")
    if column in PREFERENCE and (value is False or (column == "kto_tag" and value == 0)):
        raise RowProblem(
            f"{column}: {shown(value)} marks an answer to avoid, which makes this preference data (task: preference), "
            f"which lorafit does not train; keep the rows with {column}: true",
            kind="preference",
        )
    if column in TEMPLATE_KWARGS and value:
        _refuse_other_template_kwargs(column, value, template_kwargs)
    if column in TOKENS and isinstance(value, list) and not has_own_format:
        raise RowProblem(
            f"{column}: {shown(value)} says which tokens are learnt and is not read; lorafit makes tokens of the text "
            "and learns its answers, without messages marked train: false; say so with format:, or remove the column",
            kind="unobeyed",
        )


def _as_meant(value: Any) -> Any:
    """What a field of a CSV file says, which is always text."""
    try:
        return json.loads(value.lower()) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _refuse_other_template_kwargs(column: str, value: Any, ours: Mapping[str, Any]) -> None:
    if isinstance(value, str):
        value = parsed(value, column)
    if not isinstance(value, dict):
        raise RowProblem(f"{column}: {shown(value)} where an object belongs; remove the column", kind="unobeyed")
    others = {key: setting for key, setting in value.items() if setting is not None and ours.get(key) != setting}
    if others:
        written = ", ".join(f"{key}: {json.dumps(setting, ensure_ascii=False)}" for key, setting in others.items())
        raise RowProblem(
            f"{column}: {shown(value)} is for one row, and every row is rendered alike; write "
            f"data.template_kwargs: {{{written}}}, and train rows with other values in a run of their own",
            kind="unobeyed",
        )
