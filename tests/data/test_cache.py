"""Prepared tokens are kept by content: found again wherever the files lie, made again when anything changed."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorafit.data import cache
from lorafit.data.prepare import PreparedData
from lorafit.recipe.sections import DataSection, Source
from support.sources import CHATML, prepared, section, word_tokenizer
from support.tiny import sums, write_jsonl


def names(directory: Path) -> list[str]:
    """What lies there, but for the hashes that are remembered of data files."""
    return sorted(entry.name for entry in directory.iterdir() if entry.name != "digests")


def content(data: PreparedData) -> list[dict[str, Any]]:
    return [row for table in (data.train, data.eval) if table for row in table]


def test_a_second_call_reads_the_same_tokens_and_audit_without_parsing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*sums(20), sums(1)[0]]
    data = section(write_jsonl(tmp_path / "a.jsonl", rows), eval_fraction=0.2)
    first = prepared(data, word_tokenizer(CHATML), cache_dir=tmp_path / "cache")
    monkeypatch.setattr("lorafit.data.prepare.scan", None)
    second = prepared(data, word_tokenizer(CHATML), cache_dir=tmp_path / "cache")
    assert content(first) == content(second) and len(content(first)) == 21
    assert first.fingerprint == second.fingerprint and first.files == second.files
    assert first.audit.as_dict() == second.audit.as_dict() and first.audit.warnings == second.audit.warnings
    assert first.train.features == second.train.features


def test_moved_files_are_found_again_and_named_as_they_are_now(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*sums(3), sums(1)[0]])
    prepared(section(path), word_tokenizer(CHATML), cache_dir=tmp_path / "cache")
    moved = path.rename(tmp_path / "b.jsonl")
    made = prepared(section(moved), word_tokenizer(CHATML), cache_dir=tmp_path / "cache")
    assert len(names(tmp_path / "cache")) == 1
    assert made.files == (str(moved),) and "b.jsonl:4" in made.audit.warnings[0]


def _same_size_other_text(path: Path) -> dict[str, Any]:
    stat = path.stat()
    path.write_text(path.read_text().replace("It is", "It iz"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return {}


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "bytes of the data, not size or time": _same_size_other_text,
    "template": lambda _: {"tokenizer": word_tokenizer(CHATML.replace("\n", " "))},
    "tokens": lambda _: {"tokenizer": word_tokenizer(CHATML, bos_token="<|eot|>")},
    "setting": lambda path: {"data": section(path, train_on="all")},
    "columns": lambda path: {
        "data": section(path, source={"columns": {"prompt": "completion", "completion": "prompt"}})
    },
    "limit": lambda path: {"data": section(path, source={"limit": 2})},
    "max_length": lambda _: {"max_length": 4095},
    "stop tokens": lambda _: {"stops": frozenset({3, 4})},
}


@pytest.mark.parametrize("change", CHANGES)
def test_tokens_are_made_again_when_anything_they_depend_on_changes(tmp_path: Path, change: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sums(3))
    settings: dict[str, Any] = {
        "data": section(path),
        "tokenizer": word_tokenizer(CHATML),
        "cache_dir": tmp_path / "cache",
    }
    before = prepared(**settings)
    after = prepared(**(settings | CHANGES[change](path)))
    assert before.fingerprint != after.fingerprint
    assert len(names(tmp_path / "cache")) == 2


def test_train_and_eval_sources_do_not_stand_for_each_other(tmp_path: Path) -> None:
    one, two = (Source(path=str(write_jsonl(tmp_path / f"{n}.jsonl", sums(3, first=n)))) for n in (0, 10))
    prints = {
        prepared(DataSection(**sides), word_tokenizer(CHATML)).fingerprint
        for sides in ({"train": (one, two)}, {"train": (two, one)}, {"train": (one,), "eval": (two,)})
    }
    assert len(prints) == 3


@pytest.mark.parametrize("damage", ["flip a byte", "cut", "remove", "facts"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    data = section(write_jsonl(tmp_path / "a.jsonl", sums(5)))
    first = prepared(data, word_tokenizer(CHATML), cache_dir=tmp_path / "cache")
    table = tmp_path / "cache" / first.fingerprint / "train.arrow"
    stored, before = bytearray(table.read_bytes()), content(first)
    if damage == "flip a byte":
        stored[len(stored) // 2] ^= 1
        table.write_bytes(stored)
    elif damage == "cut":
        table.write_bytes(stored[:-9])
    elif damage == "remove":
        table.unlink()
    else:
        (table.parent / "facts.json").write_text('{"sha256": ')
    again = prepared(data, word_tokenizer(CHATML), cache_dir=tmp_path / "cache")
    assert content(again) == before
    assert cache.load(tmp_path / "cache", first.fingerprint) is not None


def test_nothing_unfinished_is_left_beside_the_entries(tmp_path: Path) -> None:
    data = section(write_jsonl(tmp_path / "a.jsonl", sums(5)))
    made = prepared(data, word_tokenizer(CHATML), cache_dir=tmp_path / "cache")
    assert names(tmp_path / "cache") == [made.fingerprint]
    entry = tmp_path / "cache" / made.fingerprint
    assert names(entry) == ["facts.json", "train.arrow"]
    umask = os.umask(0o022)
    os.umask(umask)
    assert entry.stat().st_mode & 0o777 == 0o777 & ~umask


def test_the_slower_of_two_writers_leaves_the_entry_of_the_faster(tmp_path: Path) -> None:
    made = prepared(
        section(write_jsonl(tmp_path / "a.jsonl", sums(5))), word_tokenizer(CHATML), cache_dir=tmp_path / "c"
    )
    before = (tmp_path / "c" / made.fingerprint).stat().st_ino
    with cache.new_entry(tmp_path / "c", made.fingerprint) as stage:
        (stage / "train.arrow").write_text("the same, but later")
    assert (tmp_path / "c" / made.fingerprint).stat().st_ino == before
    assert names(tmp_path / "c") == [made.fingerprint]


def test_those_that_prepare_at_once_all_get_the_tokens(tmp_path: Path) -> None:
    data = section(write_jsonl(tmp_path / "a.jsonl", sums(100)))
    with ThreadPoolExecutor(4) as threads:
        running = [
            threads.submit(prepared, data, word_tokenizer(CHATML), cache_dir=tmp_path / "cache") for _ in range(4)
        ]
        made = [done.result() for done in running]
    assert all(content(each) == content(made[0]) for each in made) and len(made[0].train) == 100
    assert names(tmp_path / "cache") == [made[0].fingerprint]


def test_a_cache_that_cannot_be_written_costs_only_the_next_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    data = section(write_jsonl(tmp_path / "a.jsonl", sums(5)))
    assert len(prepared(data, word_tokenizer(CHATML), cache_dir=tmp_path / "cache").train) == 5
    assert "tokens are not kept for the next run" in caplog.text


def test_no_cache_is_kept_when_none_is_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sums(5))
    assert len(prepared(section(path), word_tokenizer(CHATML)).train) == 5
    assert names(tmp_path) == ["a.jsonl"]
