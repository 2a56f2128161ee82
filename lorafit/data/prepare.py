"""The rows of a recipe as tokens and labels, audited, from the cache when nothing has changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow
import tokenizers
import transformers
from datasets.table import InMemoryTable
from transformers import PreTrainedTokenizerBase

import lorafit
from lorafit.data import cache
from lorafit.data.audit import Audit
from lorafit.data.digest import DATE, TOKENS, digests
from lorafit.data.encode import write_tables
from lorafit.data.hub import HubTables
from lorafit.data.listing import identities, listing
from lorafit.data.prompts import Prompt, as_json, from_json
from lorafit.data.remote import Downloads
from lorafit.data.render import Renderer
from lorafit.data.scan import CHANGED, scan
from lorafit.data.tokens import Limits, TextTokenizer
from lorafit.errors import DataError, DiskError
from lorafit.launching.signals import ends_clean
from lorafit.recipe.sections import DataSection
from lorafit.storage.no_room import NO_ROOM
from lorafit.storage.stage import remove_abandoned, stage_beside
from lorafit.tasks import DEFAULT_TASK, TaskName
from lorafit.tasks.pages import rows_page

logger = logging.getLogger(__name__)

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
    prompts: tuple[Prompt, ...]
    """Some of each shape of row, to hold the saved chat template against."""


def prepare(
    section: DataSection,
    *,
    task: TaskName,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    stop_token_ids: frozenset[int],
    vocab_size: int,
    cache_dir: Path | None,
    as_of: str | None = None,
    is_held_out: bool = False,
    show_progress: bool = False,
) -> PreparedData:
    """What `task` makes of every row. `vocab_size` is the number of rows of the embedding.

    `is_held_out` says that all of them are measured on, none trained, whatever their files are called.
    A template that writes the date makes other tokens every day; those of the day `as_of` are taken, if still there.

    Raises DataError with every problem of the data, RecipeError or ModelError when there is no template.
    """
    if section.stop_token is not None:
        stop_token_ids |= {cast(int, tokenizer.convert_tokens_to_ids(section.stop_token))}
    renderer = Renderer(section, tokenizer, stop_token_ids=stop_token_ids)
    text_tokenizer = TextTokenizer(tokenizer)
    limits = Limits(max_length, section.over_length, stop_token_ids, vocab_size)
    with ends_clean(), ExitStack() as made:
        downloads = Downloads(lambda: _aside("downloads", cache_dir, made))
        hub, sources = HubTables(), listing(section, is_held_out=is_held_out, downloads=downloads)
        before = identities(sources)
        now = digests(sources, section, hub=hub, cache_dir=cache_dir)
        facts = _facts(section, task, now, tokenizer, text_tokenizer, renderer, limits, seed=seed)
        then = facts | {"date": as_of}
        if cache_dir and as_of and facts["date"] and cache.load(cache_dir, _hash(then)):
            facts = then
        known = _Known(facts, tuple(name for listed in sources for name in listed.names))
        if found := known.stored(cache_dir):
            return found
        scanned = scan(section, seed=seed, hub_rows=hub.rows, listed=sources, show_progress=show_progress)
        if any(now[number] != digest for number, digest in scanned.reading.digests.items()):
            raise DataError(CHANGED, where="data")
        stage = _new_entry(cache_dir, known.fingerprint, made)
        into = stage or _aside("lorafit-tokens", None, made)
        with _full_disk_is_said(cache_dir if stage and cache_dir else into.parent):
            encoded = write_tables(
                scanned,
                section,
                rows_page(task).encode,
                renderer,
                text_tokenizer,
                limits,
                into=into,
                seed=seed,
                show_progress=show_progress,
            )
            after = identities(sources)
            if any(after[number] != before[number] for number in after.keys() - scanned.reading.digests.keys()):
                raise DataError(CHANGED, where="data")
            prompts = renderer.prompts.encoded(text_tokenizer)
            # What is mapped of the files stays, also when they are gone.
            fresh = known.data(_mapped(encoded.tables, known.fingerprint), encoded.audit, encoded.tokens, prompts)
            if stage is None:
                return fresh
            audit = encoded.audit.as_dict()
            cache.seal(stage, encoded.tables, audit=audit, prompts=as_json(prompts), tokens=encoded.tokens)
            made.close()
        return known.stored(cache_dir) or fresh


class _Known:
    """Everything the tokens depend on, and with it prepared data."""

    def __init__(self, facts: dict[str, Any], files: tuple[str, ...]) -> None:
        self._facts, self._files = facts, files
        self.fingerprint = _hash(facts)

    def stored(self, cache_dir: Path | None) -> PreparedData | None:
        """What the cache holds of it."""
        entry = cache.load(cache_dir, self.fingerprint) if cache_dir else None
        if entry is None:
            return None
        tables = {name: datasets.Dataset.from_file(str(path)) for name, path in entry.tables.items()}
        audit = Audit.from_dict(entry.audit, files=self._files)
        return self.data(tables, audit, entry.tokens, from_json(entry.prompts))

    def data(
        self, tables: Mapping[str, datasets.Dataset], audit: Audit, tokens: str, prompts: tuple[Prompt, ...]
    ) -> PreparedData:
        """The same of tables that were made just now."""
        parts = {name: _hash(self._facts[fact])[:12] for name, fact in PARTS.items()}
        parts |= {DATE: str(self._facts["date"]), TOKENS: tokens}
        return PreparedData(tables["train"], tables.get("eval"), audit, self.fingerprint, parts, self._files, prompts)


def _aside(name: str, cache_dir: Path | None, made: ExitStack) -> Path:
    """A directory that is gone once `made` is closed: in the cache, or where temporary files go."""
    for parent in (cache_dir, Path(tempfile.gettempdir())):
        if parent and (not parent.exists() or (os.access(parent, os.W_OK | os.X_OK) and parent.is_dir())):
            remove_abandoned(parent)
            return made.enter_context(stage_beside(parent / name))
    raise DiskError("cannot be written to; set TMPDIR or LORAFIT_CACHE", where=tempfile.gettempdir())


def _new_entry(cache_dir: Path | None, fingerprint: str, made: ExitStack) -> Path | None:
    """Where the cache takes a new entry, until `made` is closed; None where there is no cache."""
    if cache_dir is None:
        return None
    try:
        return made.enter_context(cache.new_entry(cache_dir, fingerprint))
    except OSError as error:
        logger.warning("%s: tokens are not kept for the next run: %s", cache_dir, error.strerror)
        return None


@contextmanager
def _full_disk_is_said(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        message = f"{error.strerror} while the tokens are written; make room, or set LORAFIT_CACHE to another disk"
        raise DiskError(message, where=str(directory)) from None


def _mapped(tables: Mapping[str, Path], fingerprint: str) -> dict[str, datasets.Dataset]:
    opened = {}
    for name, path in tables.items():
        with pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))) as stream:
            table = InMemoryTable(stream.read_all())
        # Without a fingerprint `datasets` makes one of a copy of all that the table holds.
        opened[name] = datasets.Dataset(table, fingerprint=f"{fingerprint}-{name}")
    return opened


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _facts(
    section: DataSection,
    task: TaskName,
    data: tuple[str, ...],
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
    template = renderer.saved_templates
    draws = section.eval_fraction is not None or any(source.weight % 1 for source in section.train)
    writes_date = "strftime_now" in str(template)
    return {
        "format": cache.FORMAT,
        "versions": (lorafit.__version__, transformers.__version__, tokenizers.__version__),
        "data": data,
        "settings": section.model_dump(exclude={"train", "eval"} | ({"template"} if template else set())),
        "sources": (len(section.train), sources),
        "template": template,
        "date": str(date.today()) if writes_date else None,
        "tokenizer": hashlib.sha256(text_tokenizer.content.encode()).hexdigest(),
        "special_tokens": tokenizer.special_tokens_map,
        "limits": (limits.max_length, sorted(limits.stop_token_ids), limits.vocab_size),
        "seed": seed if draws else None,
        **({} if task == DEFAULT_TASK.name else {"task": task}),
    }
