"""The rows of a recipe as tokens and labels, audited, from the cache when nothing has changed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import tokenizers
import transformers
from datasets.table import InMemoryTable
from transformers import PreTrainedTokenizerBase

import lorafit
from lorafit.data import cache
from lorafit.data.audit import Audit, SideAudit, side_audit
from lorafit.data.digest import DATE, TOKENS, contents
from lorafit.data.findings import Findings, refuse_too_many_lost
from lorafit.data.hub import hub_rows
from lorafit.data.render import Renderer
from lorafit.data.rows import Row
from lorafit.data.scan import DataScan, Side, epoch_rows, scan
from lorafit.data.tokens import NOT_TRAINED, Limits, Sequence, TextTokenizer
from lorafit.data.turns import Rendered
from lorafit.errors import DataError, Problem
from lorafit.recipe.sections import DataSection

logger = logging.getLogger(__name__)

SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "labels": pyarrow.list_(pyarrow.int32()),
        "file": pyarrow.int32(),
        "line": pyarrow.int64(),
    }
)
SEQUENCES_PER_BATCH = 10_000
PARTS = {
    "data files": "data",
    "chat template": "template",
    "tokenizer": "tokenizer",
    "special tokens": "special_tokens",
}


@dataclass(frozen=True)
class PreparedData:
    """Tokens and labels of both sides."""

    train: datasets.Dataset
    """Columns `input_ids`, `labels` (-100 where not trained), `file` and `line`: where the row came from."""
    eval: datasets.Dataset | None
    audit: Audit
    fingerprint: str
    """SHA-256 of everything the tokens depend on."""
    parts: dict[str, str]
    """What of that is no key of a recipe, and the tokens themselves; each in a word, or by the start of its hash."""
    files: tuple[str, ...]
    """What `file` indexes."""


def prepare(
    section: DataSection,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    stop_token_ids: frozenset[int],
    vocab_size: int,
    cache_dir: Path | None,
    as_of: str | None = None,
) -> PreparedData:
    """Tokens and labels of every row. `vocab_size` is the number of rows of the embedding.

    A template that writes the date makes other tokens every day; those of the day `as_of` are taken, if still there.

    Raises DataError with every problem of the data, RecipeError or ModelError when there is no template.
    """
    renderer = Renderer(section, tokenizer, stop_token_ids=stop_token_ids)
    text_tokenizer = TextTokenizer(tokenizer, adds_bos=renderer.adds_bos)
    limits = Limits(max_length, section.over_length, stop_token_ids, vocab_size)
    now = contents(section, hub_rows=hub_rows)
    facts = _facts(section, now.digests, tokenizer, text_tokenizer, renderer, limits, seed=seed)
    then = facts | {"date": as_of}
    if cache_dir and as_of and facts["date"] and cache.load(cache_dir, _hash(then)):
        facts = then
    fingerprint = _hash(facts)
    parts = {name: _hash(facts[fact])[:12] for name, fact in PARTS.items()} | {DATE: str(facts["date"])}
    stored = cache.load(cache_dir, fingerprint) if cache_dir else None
    if stored:
        tables, counts = stored
        loaded = {name: datasets.Dataset.from_file(str(path)) for name, path in tables.items()}
        audit = Audit.from_dict(counts, files=now.files)
        parts |= {TOKENS: _tokens_hash(loaded)}
        return PreparedData(loaded["train"], loaded.get("eval"), audit, fingerprint, parts, now.files)
    scanned = scan(section, seed=seed, hub_rows=hub_rows)
    if any(read not in (None, hashed) for read, hashed in zip(scanned.digests, now.digests, strict=True)):
        raise DataError("the files changed while they were read; run again when they are written", where="data")
    made, audit = _make(scanned, section, renderer, text_tokenizer, limits, seed=seed)
    if cache_dir:
        try:
            cache.store(cache_dir, fingerprint, made, audit.as_dict())
        except OSError as error:
            logger.warning("%s: tokens are not kept for the next run: %s", cache_dir, error.strerror)
    loaded = {name: datasets.Dataset(InMemoryTable(table)) for name, table in made.items()}
    parts |= {TOKENS: _tokens_hash(loaded)}
    return PreparedData(loaded["train"], loaded.get("eval"), audit, fingerprint, parts, now.files)


def _make(
    scanned: DataScan,
    section: DataSection,
    renderer: Renderer,
    text_tokenizer: TextTokenizer,
    limits: Limits,
    *,
    seed: int,
) -> tuple[dict[str, pyarrow.Table], Audit]:
    """The token tables of both sides and their audit.

    Raises DataError.
    """
    sides: dict[Side, list[Row]] = {"train": scanned.train, "eval": scanned.eval}
    sequences = {
        side: list(text_tokenizer.sequences(_rendered(sides[side], renderer, findings), limits, findings))
        for side, findings in scanned.findings.items()
    }
    problems = [p for findings in scanned.findings.values() for p in findings.problems("error", scanned.files)]
    longest = max((len(sequence.input_ids) for made in sequences.values() for sequence in made), default=0)
    if longest > limits.max_length:
        mend = f"the longest row has {longest:,} tokens; raise it to that, or set data.over_length: drop or truncate"
        problems.append(Problem("training.max_length", mend))
    if problems:
        raise DataError(problems)
    tables, audits = {}, {}
    for side, findings in scanned.findings.items():
        if side == "train" or scanned.eval:
            refuse_too_many_lost(
                findings,
                rows=len(sequences[side]) + findings.count("lost"),
                allowed=section.max_lost_rows,
                files=scanned.files,
                side=side,
            )
            order = epoch_rows([sequence.place for sequence in sequences[side]], scanned, seed=seed)
            kept = [sequences[side][index] for index in order]
            tables[side] = _table(kept)
            audits[side] = _audit_of(kept, findings)
    audit = Audit(
        audits["train"], audits.get("eval"), scanned.findings["train"], scanned.findings["eval"], scanned.files
    )
    return {str(side): table for side, table in tables.items()}, audit


def _rendered(rows: Iterable[Row], renderer: Renderer, findings: Findings) -> Iterator[Rendered]:
    for row in rows:
        yield from renderer.render(row, findings)


def _audit_of(sequences: list[Sequence], findings: Findings) -> SideAudit:
    lengths = [len(sequence.input_ids) for sequence in sequences]
    trained = [int((sequence.labels != NOT_TRAINED).sum()) for sequence in sequences]
    rows = sum(1 for _ in groupby(sequences, key=lambda sequence: sequence.place))
    return side_audit(rows, lengths, trained, findings.count("lost"))


def _table(sequences: list[Sequence]) -> pyarrow.Table:
    batches = []
    for start in range(0, len(sequences), SEQUENCES_PER_BATCH):
        some = sequences[start : start + SEQUENCES_PER_BATCH]
        columns: list[list[Any]] = [
            [sequence.input_ids for sequence in some],
            [sequence.labels for sequence in some],
            [sequence.place[0] for sequence in some],
            [sequence.place[1] for sequence in some],
        ]
        arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        batches.append(pyarrow.RecordBatch.from_arrays(arrays, schema=SCHEMA))
    return pyarrow.Table.from_batches(batches, schema=SCHEMA)


def _tokens_hash(sides: dict[str, datasets.Dataset]) -> str:
    """Of what the model sees, whatever wrote it: about a second for a billion tokens."""
    columns = [(name, column) for name in sorted(sides) for column in ("input_ids", "labels")]
    hashes = []
    for name, column in columns:
        lengths, values = hashlib.sha256(), hashlib.sha256()
        for chunk in sides[name].data.column(column).chunks:
            lengths.update(chunk.value_lengths().to_numpy())
            values.update(chunk.flatten().to_numpy())
        hashes.append((name, column, lengths.hexdigest(), values.hexdigest()))
    return _hash(hashes)[:12]


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _facts(
    section: DataSection,
    digests: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    text_tokenizer: TextTokenizer,
    renderer: Renderer,
    limits: Limits,
    *,
    seed: int,
) -> dict[str, Any]:
    """Everything the tokens depend on: two runs with the same share them, wherever the files lie."""
    sources = [
        source.model_dump(exclude={"path", "hub", "name", "split", "revision"})
        for source in (*section.train, *section.eval)
    ]
    template = tokenizer.chat_template if section.template == "chat" else renderer.template_text
    draws = section.eval_fraction is not None or any(source.weight % 1 for source in section.train)
    writes_date = "strftime_now" in str(template)
    return {
        "versions": (lorafit.__version__, transformers.__version__, tokenizers.__version__),
        "data": digests,
        "settings": section.model_dump(exclude={"train", "eval"} | ({"template"} if template else set())),
        "sources": (len(section.train), sources),
        "template": template,
        "date": str(date.today()) if writes_date else None,
        "tokenizer": hashlib.sha256(text_tokenizer.content.encode()).hexdigest(),
        "special_tokens": tokenizer.special_tokens_map,
        "limits": (limits.max_length, sorted(limits.stop_token_ids), limits.vocab_size),
        "seed": seed if draws else None,
    }
