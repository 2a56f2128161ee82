"""HTML that is safe by construction: a string is escaped wherever it goes in, unless it is `Html` already.

Joining or formatting `Html` gives a plain string, which is escaped when it is used: a slip shows, it never runs.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lorafit.report.escape_control import inert
from lorafit.report.page.style import STYLE


class Html(str):
    """Markup that is put in as it is."""

    __slots__ = ()


def element(tag: str, *children: str, css: str = "", attributes: Mapping[str, str] | None = None) -> Html:
    """`<tag class=css ...>children</tag>`."""
    named = {**({"class": css} if css else {}), **(attributes or {})}
    written = "".join(f' {name}="{escape(inert(value))}"' for name, value in named.items())
    return Html(f"<{tag}{written}>{joined(children)}</{tag}>")


def joined(parts: Iterable[str]) -> Html:
    """The parts one after the other, each escaped that is no markup yet."""
    return Html("".join(part if isinstance(part, Html) else escape(inert(part)) for part in parts))


def number(value: Any, form: str = ",", *, per: float = 1, unit: str = "") -> Html:
    """A number as `form` writes value / per; the value itself, as in the JSON, is the element's `value`.

    What is no number is shown as the text it is.
    """
    if not is_number(value):
        return joined([str(value)])
    shown = format(value / per if per != 1 else value, form) if math.isfinite(value) else "not finite"
    return element("data", f"{shown.replace('%', ' %')}{f' {unit}' if unit else ''}", attributes={"value": repr(value)})


def is_number(value: Any) -> bool:
    """A JSON number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def section(title: str, *children: str) -> Html:
    """A part of the page under its heading; nothing when there is nothing in it."""
    return element("section", element("h2", title), *children) if any(children) else Html("")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A table that scrolls by itself where it is wider than the page; columns of numbers stand to the right."""
    if not rows:
        return Html("")
    css = ["n" * any(map(_is_figure, column)) for column in zip(*rows, strict=True)]
    names = [element("th", name, css=kind, attributes={"scope": "col"}) for name, kind in zip(head, css, strict=True)]
    body = [
        element("tr", *(element("td", cell, css=kind) for cell, kind in zip(row, css, strict=True))) for row in rows
    ]
    whole = element("table", element("thead", element("tr", *names)), element("tbody", *body))
    return element("div", whole, css="scroll", attributes={"tabindex": "0"})


def _is_figure(cell: str) -> bool:
    return isinstance(cell, Html) and cell.startswith("<data")


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Names and what they are, one below the other."""
    inside = [Html(element("dt", name) + element("dd", value)) for name, value in pairs if value]
    return element("dl", *inside) if inside else Html("")


def page(title: str, *children: str) -> str:
    """One document that needs no other file, and may load none: only its own style is let in, by its hash."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    metas = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="referrer" content="no-referrer">',
    ]
    head = f"{''.join(metas)}{element('title', title)}<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{element("main", *children)}</body></html>\n'
