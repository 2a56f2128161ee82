"""A second task, to see that one can be added: what its models are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lorafit.data.findings import Findings
from lorafit.data.listing import Side
from lorafit.data.render import Renderer
from lorafit.data.rows import Row, Text, texts
from lorafit.data.tokens import Limits, Sequence, TextTokenizer
from lorafit.tasks.causal_lm_rows import encode as encode_texts


def encode(
    rows: Iterable[tuple[Side, Row]],
    renderer: Renderer,
    *,
    tokenizer: TextTokenizer,
    limits: Limits,
    findings: Mapping[Side, Findings],
) -> Iterator[tuple[Side, Sequence]]:
    """All that was written into a row, without a template, and all of it trained."""
    joined = ((side, Text(row.place, "\n".join(texts(row)))) for side, row in rows)
    return encode_texts(joined, renderer, tokenizer=tokenizer, limits=limits, findings=findings)
