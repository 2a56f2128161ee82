"""`lorafit preview` for people: tokens with the trained ones marked, as text, in colour, or as one HTML page."""

from __future__ import annotations

from dataclasses import asdict

from lorafit.data.preview import Preview, RowView, TokenView
from lorafit.report.escape_control import inert
from lorafit.report.page.html import element, page
from lorafit.report.page.tokens import legend, token_row

TRAINED, CONTEXT, STOP, OFF = "\x1b[32m", "\x1b[2m", "\x1b[1;7;32m", "\x1b[0m"


def preview_text(preview: Preview, *, in_colour: bool) -> str:
    """Every row, `|` after a token; trained tokens in brackets, the stop token in double ones; or all in colour."""
    mark = _coloured if in_colour else _bracketed
    legend = "green tokens are trained" if in_colour else "tokens in [ ] are trained, [[ ]] is the stop token"
    lines = [f"{legend}; generation stops on {', '.join(preview.stop_tokens)}", ""]
    for row in preview.rows:
        lines += [_title(row), "".join(mark(token) for token in row.tokens), ""]
    return "\n".join([*lines, preview.audit.table(), "", preview.audit.summary()])


def _title(row: RowView) -> str:
    trained = sum(len(token.ids) for token in row.tokens if token.is_trained)
    return f"{row.side} {row.where}: {sum(len(token.ids) for token in row.tokens):,} tokens, {trained:,} trained"


def _bracketed(token: TokenView) -> str:
    text = _visible(token.text)
    if token.is_stop:
        return f"[[{text}]]"
    return f"[{text}]" if token.is_trained else f"{text}|"


def _coloured(token: TokenView) -> str:
    colour = STOP if token.is_stop else TRAINED if token.is_trained else CONTEXT
    return f"{colour}{_visible(token.text)}{OFF}"


def _visible(text: str) -> str:
    """The text so that data cannot steer the terminal; line ends are shown and kept."""
    return inert(text).replace("\n", "↵\n")


def preview_page(preview: Preview) -> str:
    """One HTML page that needs no other file."""
    warnings = [element("p", f"warning: {warning}", css="warn") for warning in preview.audit.warnings]
    rows = [
        part
        for row in preview.rows
        for part in (element("h3", _title(row)), token_row(asdict(row)["tokens"], most=len(row.tokens)))
    ]
    return page(
        "lorafit preview",
        element("h1", "lorafit preview"),
        element("p", preview.audit.summary(), css="lead"),
        legend(preview.stop_tokens),
        *warnings,
        element("pre", preview.audit.table()),
        *rows,
    )
