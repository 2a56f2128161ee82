"""Sequences -> an Arrow file in the order of an epoch, a batch at a time in memory."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow

from lorafit.data.scan import share_of
from lorafit.data.tokens import NOT_TRAINED
from lorafit.data.tokens import Sequence as TokenSequence

SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "labels": pyarrow.list_(pyarrow.int32()),
        "file": pyarrow.int32(),
        "line": pyarrow.int64(),
    }
)
PLACE = ("file", "line")
"""Columns that say where a row came from; the others are what a model is given."""

SEQUENCES_PER_BATCH = 10_000
TOKENS_PER_BATCH = 1 << 20


class TableCounts:
    """What one side is, counted while it is written."""

    def __init__(self) -> None:
        self.rows = 0
        """Rows of the files, weights included; a row that became several sequences is one."""
        self.lengths: Counter[int] = Counter()
        """How many sequences have so many tokens."""
        self.trained: Counter[int] = Counter()
        """How many have so many trained tokens."""
        self._last: tuple[int, int] | None = None

    def add(self, batch: pyarrow.RecordBatch) -> None:
        lengths = batch.column("input_ids").value_lengths().to_numpy()
        is_trained = batch.column("labels").flatten().to_numpy() != NOT_TRAINED
        before = np.concatenate([[0], np.cumsum(is_trained, dtype=np.int64)])
        ends = np.cumsum(lengths, dtype=np.int64)
        _count(self.lengths, lengths)
        _count(self.trained, before[ends] - before[ends - lengths])
        file, line = (batch.column(name).to_numpy() for name in PLACE)
        begins = (file[1:] != file[:-1]) | (line[1:] != line[:-1])
        self.rows += int(begins.sum()) + ((file[0], line[0]) != self._last)
        self._last = (file[-1], line[-1])


def _count(counts: Counter[int], numbers: Any) -> None:
    for number, times in zip(*(found.tolist() for found in np.unique(numbers, return_counts=True)), strict=True):
        counts[number] += times


class TableWriter:
    """Writes the sequences of one side, those of each source as often as its weight says.

    A source whose weight is not 1 is written beside the table first, and copied when all of it is there.
    """

    def __init__(self, path: Path, *, weights: Sequence[float], source_of_file: Sequence[int], seed: int) -> None:
        self._path, self._weights, self._source_of_file, self._seed = path, weights, source_of_file, seed
        self._table = _ArrowFile(path)
        self._aside: _ArrowFile | None = None
        self._source: int | None = None
        self._in_source = 0
        self._batch: list[TokenSequence] = []
        self._batch_tokens = 0
        self._hashes = {name: (hashlib.sha256(), hashlib.sha256()) for name in ("input_ids", "labels")}
        self.counts = TableCounts()
        self.sequences = 0
        """Those that were added, each once."""
        self.written: Counter[int] = Counter()
        """Sequences in the table, by source."""

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end_source()
        for file in filter(None, (self._table, self._aside)):
            file.close()

    def add(self, sequence: TokenSequence) -> None:
        """One more sequence; those of a source follow each other."""
        source = self._source_of_file[sequence.place[0]]
        if source != self._source:
            self._end_source()
            self._source = source
            if self._weights[source] != 1:
                self._aside = _ArrowFile(self._path.with_suffix(".part"))
        self._batch.append(sequence)
        self._batch_tokens += len(sequence.input_ids)
        self.sequences += 1
        self._in_source += 1
        if len(self._batch) == SEQUENCES_PER_BATCH or self._batch_tokens >= TOKENS_PER_BATCH:
            self._end_batch()

    def tokens_hashes(self) -> Iterator[tuple[str, str, str]]:
        """Each column that the model sees, with SHA-256 of its lengths and of its values."""
        for name, (lengths, values) in self._hashes.items():
            yield name, lengths.hexdigest(), values.hexdigest()

    def _end_batch(self) -> None:
        if not self._batch:
            return
        batch = _record_batch(self._batch)
        self._batch, self._batch_tokens = [], 0
        if self._aside:
            self._aside.write(batch)
        else:
            self._write(batch)

    def _end_source(self) -> None:
        self._end_batch()
        if self._aside and self._source is not None:
            self._aside.close()
            self._copy(self._aside.path, self._source)
            self._aside.path.unlink()
        self._aside, self._in_source = None, 0

    def _copy(self, path: Path, source: int) -> None:
        """The sequences of a source as often as its weight says, and a share of them drawn by seed."""
        weight = self._weights[source]
        for _ in range(int(weight)):
            for batch in _batches(path):
                self._write(batch)
        drawn = random.Random(f"{self._seed}:{source}").sample(
            range(self._in_source), share_of(self._in_source, weight)
        )
        chosen = np.array(array("q", sorted(drawn)))
        first = 0
        for batch in _batches(path):
            of_batch = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + len(batch))] - first
            if len(of_batch):
                self._write(batch.take(pyarrow.array(of_batch)))
            first += len(batch)

    def _write(self, batch: pyarrow.RecordBatch) -> None:
        self._table.write(batch)
        self.counts.add(batch)
        if self._source is not None:
            self.written[self._source] += len(batch)
        for name, (lengths, values) in self._hashes.items():
            lengths.update(batch.column(name).value_lengths().to_numpy())
            values.update(batch.column(name).flatten().to_numpy())


class _ArrowFile:
    """A stream of record batches on its way to the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._stream = pyarrow.ipc.new_stream(self._file, SCHEMA)

    def write(self, batch: pyarrow.RecordBatch) -> None:
        self._stream.write_batch(batch)

    def close(self) -> None:
        """The second time nothing happens."""
        if not self._file.closed:
            self._stream.close()
            self._file.close()


def _batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
        yield from stream


def _record_batch(sequences: list[TokenSequence]) -> pyarrow.RecordBatch:
    offsets = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum([len(sequence.input_ids) for sequence in sequences], out=offsets[1:])
    columns = [
        pyarrow.ListArray.from_arrays(offsets, np.concatenate([sequence.input_ids for sequence in sequences])),
        pyarrow.ListArray.from_arrays(offsets, np.concatenate([sequence.labels for sequence in sequences])),
        pyarrow.array([sequence.place[0] for sequence in sequences], pyarrow.int32()),
        pyarrow.array([sequence.place[1] for sequence in sequences], pyarrow.int64()),
    ]
    return pyarrow.RecordBatch.from_arrays(columns, schema=SCHEMA)
