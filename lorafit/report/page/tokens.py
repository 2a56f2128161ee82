"""Rows as tokens, the trained ones marked; the same in a preview and in a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafit.report.escape_control import inert
from lorafit.report.page.html import Html, element

MOST_TOKENS = 800
LONGEST_TOKEN = 200


def token_row(tokens: Sequence[dict[str, Any]], *, most: int = MOST_TOKENS) -> Html:
    """Each token in its colour; its ids are its title. Of a long row the end is left out, and said to be."""
    shown = [_token(token) for token in tokens[:most]]
    rest = f" … {len(tokens) - most:,} more" if len(tokens) > most else ""
    return element("div", *shown, rest, css="row")


def _token(token: dict[str, Any]) -> Html:
    css = "trained stop" if token["is_stop"] else "trained" if token["is_trained"] else ""
    text = inert(token["text"][:LONGEST_TOKEN]).replace("\n", "↵\n")
    return element("span", text, css=css, attributes={"title": " ".join(map(str, token["ids"]))})


def legend(stop_tokens: Sequence[str]) -> Html:
    """What the colours mean, and what ends an answer."""
    kinds = [
        *(element("span", "context"), " ", element("span", "trained", css="trained"), " "),
        element("span", "stop token", css="trained stop"),
    ]
    stops = element("span", ", ".join(stop_tokens), css="quote")
    return element("p", element("span", *kinds, css="row"), " generation stops on ", stops, css="quiet")
