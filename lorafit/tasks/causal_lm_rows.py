"""The next token from those before it: what a model is given of a row, and which of its tokens are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lorafit.data.findings import Findings
from lorafit.data.listing import Side
from lorafit.data.render import Renderer
from lorafit.data.rows import Row
from lorafit.data.tokens import Limits, Sequence, TextTokenizer


def encode(
    rows: Iterable[tuple[Side, Row]],
    renderer: Renderer,
    *,
    tokenizer: TextTokenizer,
    limits: Limits,
    findings: Mapping[Side, Findings],
) -> Iterator[tuple[Side, Sequence]]:
    """The row's text by its template, which may be several; of that the answers are trained, as the recipe says."""
    rendered = ((side, one) for side, row in rows for one in renderer.render(row, findings[side]))
    return tokenizer.sequences(rendered, limits, findings)
