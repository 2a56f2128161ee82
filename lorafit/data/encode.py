"""The second pass: checked rows -> tables of tokens and labels on disk, and their audit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorafit.data.arrow_files import TableWriter
from lorafit.data.audit import Audit, side_audit
from lorafit.data.findings import Findings, refuse_too_many_lost, where
from lorafit.data.listing import Side
from lorafit.data.progress import watched
from lorafit.data.render import Renderer
from lorafit.data.rows import Row
from lorafit.data.scan import DataScan
from lorafit.data.tokens import Limits, Sequence, TextTokenizer
from lorafit.errors import DataError, Problem
from lorafit.recipe.sections import DataSection


@dataclass(frozen=True)
class Encoded:
    """What was written."""

    tables: dict[str, Path]
    audit: Audit
    tokens: str
    """The start of a hash of what the model sees, whatever wrote it."""


class Encode(Protocol):
    """A task's own: rows -> what its model is given."""

    def __call__(
        self,
        rows: Iterable[tuple[Side, Row]],
        renderer: Renderer,
        *,
        tokenizer: TextTokenizer,
        limits: Limits,
        findings: Mapping[Side, Findings],
    ) -> Iterator[tuple[Side, Sequence]]:
        """The sequences that can be trained on, in order, each with its side; what is wrong with others is counted."""


def write_tables(
    scanned: DataScan,
    section: DataSection,
    encode: Encode,
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
        total = sum(source.rows for source in scanned.sources)
        all_rows = watched(scanned.rows(), "tokens", is_shown=show_progress, total=total)
        sequences = encode(all_rows, renderer, tokenizer=text_tokenizer, limits=limits, findings=scanned.findings)
        for side, sequence in sequences:
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
