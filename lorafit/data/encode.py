"""The second pass: checked rows -> tables of tokens and labels on disk, and their audit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lorafit.data.arrow_files import TableWriter
from lorafit.data.audit import Audit, side_audit
from lorafit.data.findings import refuse_too_many_lost, where
from lorafit.data.listing import Side
from lorafit.data.progress import watched
from lorafit.data.render import Renderer
from lorafit.data.scan import DataScan
from lorafit.data.tokens import Limits, TextTokenizer
from lorafit.data.turns import Rendered
from lorafit.errors import DataError, Problem
from lorafit.recipe.sections import DataSection


@dataclass(frozen=True)
class Encoded:
    """What was written."""

    tables: dict[str, Path]
    audit: Audit
    tokens: str
    """The start of a hash of what the model sees, whatever wrote it."""


def encode(
    scanned: DataScan,
    section: DataSection,
    renderer: Renderer,
    text_tokenizer: TextTokenizer,
    limits: Limits,
    *,
    into: Path,
    seed: int,
    show_progress: bool = False,
) -> Encoded:
    """Write `train.arrow`, and `eval.arrow` where rows are held out, into a directory.

    Raises DataError with everything that is wrong with the tokens.
    """
    sides: tuple[Side, ...] = ("train", "eval") if scanned.eval_rows else ("train",)
    weights = [source.weight for source in scanned.sources]
    if scanned.longest_chat:
        renderer.say_cost(scanned.longest_chat, where(scanned.longest_chat.place, scanned.files))
    writers, longest = {}, 0
    with ExitStack() as open_tables:
        for side in sides:
            # What is held out is measured once, however often the others of its source are trained.
            times = weights if side == "train" else [1.0] * len(weights)
            table = TableWriter(
                into / f"{side}.arrow", weights=times, source_of_file=_source_of_file(scanned), seed=seed
            )
            writers[side] = open_tables.enter_context(table)
        rendered = _rendered(scanned, renderer, show_progress=show_progress)
        for side, sequence in text_tokenizer.sequences(rendered, limits, scanned.findings):
            writers[side].add(sequence)
            longest = max(longest, len(sequence.input_ids))
    _refuse_errors(scanned, limits, longest)
    for side, writer in writers.items():
        rows = writer.sequences + scanned.findings[side].count("lost")
        findings = scanned.findings[side]
        refuse_too_many_lost(findings, rows=rows, allowed=section.max_lost_rows, files=scanned.files, side=side)
    _refuse_sources_that_are_gone(scanned, writers)
    hashes = [(side, *hashed) for side in sorted(writers) for hashed in writers[side].tokens_hashes()]
    return Encoded(
        tables={str(side): into / f"{side}.arrow" for side in sides},
        audit=_audit(scanned, writers),
        tokens=hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:12],
    )


def _audit(scanned: DataScan, writers: dict[Side, TableWriter]) -> Audit:
    found = scanned.findings
    audits = {
        side: side_audit(writer.counts.rows, writer.counts.lengths, writer.counts.trained, found[side].count("lost"))
        for side, writer in writers.items()
    }
    return Audit(audits["train"], audits.get("eval"), found["train"], found["eval"], scanned.files)


def _rendered(scanned: DataScan, renderer: Renderer, *, show_progress: bool) -> Iterator[tuple[Side, Rendered]]:
    total = sum(source.rows for source in scanned.sources)
    for side, row in watched(scanned.rows(), "tokens", is_shown=show_progress, total=total):
        for rendered in renderer.render(row, scanned.findings[side]):
            yield side, rendered


def _source_of_file(scanned: DataScan) -> list[int]:
    return [number for number, listed in enumerate(scanned.listing) for _ in listed.names]


def _refuse_errors(scanned: DataScan, limits: Limits, longest: int) -> None:
    problems = [p for findings in scanned.findings.values() for p in findings.problems("error", scanned.files)]
    if longest > limits.max_length:
        mend = f"the longest row has {longest:,} tokens; raise it to that, or set data.over_length: drop or truncate"
        problems.append(Problem("training.max_length", mend))
    if problems:
        raise DataError(problems)


def _refuse_sources_that_are_gone(scanned: DataScan, writers: dict[Side, TableWriter]) -> None:
    """A source all of whose rows were lost on the way, while those of others hide it."""
    gone = [
        Problem(f"data.{source.side}", f"no row of {source.name} can be trained on; mend its rows, or take it out")
        for number, source in enumerate(scanned.sources)
        if source.rows > source.held_out and not writers[source.side].written[number]
    ]
    if gone:
        raise DataError(gone)
