"""A checkpoint has its name only when it is whole on disk; the newest that is as it was committed is found."""

from __future__ import annotations

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorafit.storage.seal import Damaged
from lorafit.storage.stage import discard
from lorafit.training import checkpoints
from lorafit.training.checkpoints import commit, newest_verified, path_of, quarantine, rotate, verified


def committed(directory: Path, step: int, *, best_step: int | None = None) -> Path:
    """Three files, one of them deeper and one empty."""
    stage = directory / "stage.tmp" / f"checkpoint-{step}"
    (stage / "deep").mkdir(parents=True)
    (stage / "optimizer.pt").write_bytes(bytes(range(256)) * 40)
    (stage / "deep" / "state.json").write_text('{"a": 1}')
    (stage / "empty").write_bytes(b"")
    contents = {"step": step, "best_step": best_step, "seconds": 1.5, "facts": {"processes": 1}}
    commit(stage, path_of(directory, step), contents=contents)
    return path_of(directory, step)


def steps_left(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*"))


def test_what_is_committed_verifies_and_says_what_it_is(tmp_path: Path) -> None:
    checkpoint = verified(committed(tmp_path, 7, best_step=4))
    assert (checkpoint.step, checkpoint.best_step, checkpoint.seconds) == (7, 4, 1.5)
    assert checkpoint.facts == {"processes": 1}
    files = json.loads((checkpoint.path / "checkpoint.json").read_text())["checkpoint"]["files"]
    assert files.keys() == {"optimizer.pt", "deep/state.json", "empty"}


@pytest.mark.parametrize("file", ["optimizer.pt", "deep/state.json", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["removed", "halved", "grown", "emptied", "every bit turned"])
def test_every_damage_is_noticed_and_names_the_file(file: str, damage: str, tmp_path: Path) -> None:
    path = committed(tmp_path, 7) / file
    content = path.read_bytes()
    damaged = {"halved": content[: len(content) // 2], "grown": content + b"x", "emptied": b""}
    if damage == "removed":
        path.unlink()
    elif damage != "every bit turned":
        path.write_bytes(damaged[damage])
    if damage != "every bit turned":
        with pytest.raises(Damaged, match=file):
            verified(path_of(tmp_path, 7))
        return
    tried = 0
    for place in range(0, len(content), 1 if len(content) < 1000 else 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        if file == "checkpoint.json" and _says_the_same(path.read_bytes(), content):
            continue  # white space
        tried += 1
        with pytest.raises(Damaged, match=file):
            verified(path_of(tmp_path, 7))
    assert tried > 7


def _says_the_same(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_the_newest_that_verifies_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        committed(tmp_path, step)
    os.truncate(path_of(tmp_path, 10) / "optimizer.pt", 5)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "stage.tmp").mkdir(exist_ok=True)
    found = newest_verified(tmp_path)
    assert found.newest is not None and found.newest.step == 9
    assert found.damaged == (
        (tmp_path / "checkpoint-11", "checkpoint.json is missing"),
        (tmp_path / "checkpoint-10", "optimizer.pt has 5 bytes, 10,240 were committed"),
    )


def test_a_checkpoint_whose_best_adapter_is_damaged_is_passed_over(tmp_path: Path) -> None:
    for step, best_step in ((2, 2), (4, 4), (6, 4), (8, 4)):
        committed(tmp_path, step, best_step=best_step)
    (path_of(tmp_path, 4) / "empty").unlink()
    found = newest_verified(tmp_path)
    assert found.newest is not None and found.newest.step == 2
    assert {path.name: reason for path, reason in found.damaged} == {
        "checkpoint-8": "checkpoint-4, which holds the best adapter until then, is damaged or gone",
        "checkpoint-6": "checkpoint-4, which holds the best adapter until then, is damaged or gone",
        "checkpoint-4": "empty is missing",
    }


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert newest_verified(tmp_path / "nowhere") == checkpoints.Search(None, ())


@pytest.mark.parametrize(("keep", "left"), [(1, [8, 10]), (2, [8, 10]), (3, [6, 8, 10])])
def test_the_newest_stay_and_never_fewer_than_two(keep: int, left: list[int], tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        committed(tmp_path, step)
    rotate(tmp_path, keep=keep)
    assert steps_left(tmp_path) == left
    assert not list(tmp_path.glob(".*"))


def test_the_best_of_every_checkpoint_that_stays_stays(tmp_path: Path) -> None:
    for step, best_step in ((2, 2), (4, 2), (6, 6), (8, 2), (10, 10)):
        committed(tmp_path, step, best_step=best_step)
    rotate(tmp_path, keep=2)
    assert steps_left(tmp_path) == [2, 8, 10]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    committed(tmp_path, 3)
    committed(tmp_path, 3, best_step=3)
    assert verified(path_of(tmp_path, 3)).best_step == 3
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "stage.tmp"}


def test_what_is_set_aside_replaces_nothing(tmp_path: Path) -> None:
    room = tmp_path / "quarantine"
    targets = [quarantine(committed(tmp_path, 3), room) for _ in range(3)]
    assert [target.name for target in targets] == ["checkpoint-3", "checkpoint-3.2", "checkpoint-3.3"]
    assert all(verified(target) for target in targets)


def test_it_is_sealed_where_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError), ThreadPoolExecutor() as threads:
        threads.submit(print)
    sealed = committed(tmp_path, 3)
    monkeypatch.undo()
    assert verified(sealed).step == 3


def test_an_old_checkpoint_that_cannot_be_removed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 5):
        committed(tmp_path, step)

    def busy(path: Path) -> None:
        if path.name == "checkpoint-1":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        discard(path)

    monkeypatch.setattr(checkpoints, "discard", busy)
    assert rotate(tmp_path, keep=2) == {tmp_path / "checkpoint-1": os.strerror(errno.EBUSY)}
    assert steps_left(tmp_path) == [1, 3, 4]
    monkeypatch.setattr(checkpoints, "discard", discard)
    assert rotate(tmp_path, keep=2) == {}
    assert steps_left(tmp_path) == [3, 4]


def test_a_disk_that_fails_is_not_taken_for_a_busy_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 4):
        committed(tmp_path, step)

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(checkpoints, "discard", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        rotate(tmp_path, keep=2)
