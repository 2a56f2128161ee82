"""`lorafit preview` for people: tokens with the trained ones marked, as text, in colour, or as one HTML page."""

from __future__ import annotations

from html import escape

from lorafit.data.preview import Preview, RowView, TokenView

TRAINED, CONTEXT, STOP, OFF = "\x1b[32m", "\x1b[2m", "\x1b[1;7;32m", "\x1b[0m"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>lorafit preview</title><style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
h2 {{ font-size: 1rem; margin: 2rem 0 .4rem }}
.row {{ font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9 }}
.row span {{ border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 #0002; color: #666 }}
.row .trained {{ background: #c9efcf; color: #064d1a }} .row .stop {{ background: #064d1a; color: #fff }}
pre {{ background: #f5f5f5; padding: .7rem; overflow-x: auto }}
@media (prefers-color-scheme: dark) {{ body {{ background: #161616; color: #ddd }} pre {{ background: #222 }}
.row span {{ color: #999; box-shadow: inset -1px 0 #fff3 }} .row .trained {{ background: #174d26; color: #c9efcf }}
.row .stop {{ background: #c9efcf; color: #064d1a }} }}
</style></head><body><h1>lorafit preview</h1>
<p>{summary}</p><p class="row"><span>context</span> <span class="trained">trained</span>
<span class="trained stop">stop token</span> generation stops on {stops}</p>
{warnings}<pre>{table}</pre>
{rows}
</body></html>
"""


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
    """The text with its control characters spelt out, so that data cannot steer the terminal; line ends stay."""
    shown = "".join(
        letter if letter == "\n" or letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
    return shown.replace("\n", "↵\n")


def preview_page(preview: Preview) -> str:
    """One HTML page that needs no other file."""
    rows = "\n".join(
        f'<h2>{escape(_title(row))}</h2><div class="row">{"".join(map(_span, row.tokens))}</div>'
        for row in preview.rows
    )
    warnings = "".join(f"<p>warning: {escape(warning)}</p>" for warning in preview.audit.warnings)
    return _PAGE.format(
        summary=escape(preview.audit.summary()),
        stops=escape(", ".join(preview.stop_tokens)),
        warnings=warnings,
        table=escape(preview.audit.table()),
        rows=rows,
    )


def _span(token: TokenView) -> str:
    kind = ' class="trained stop"' if token.is_stop else ' class="trained"' if token.is_trained else ""
    ids = " ".join(map(str, token.ids))
    return f'<span{kind} title="{ids}">{escape(_visible(token.text))}</span>'
