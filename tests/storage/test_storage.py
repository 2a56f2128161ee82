"""What reaches the disk is whole, and only what lorafit made and marked is ever removed."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafit.storage.files import cut_torn_line, write_file
from lorafit.storage.locks import NOT_LOCKABLE
from lorafit.storage.run_dir import RunDir
from lorafit.storage.run_lock import RunLock
from lorafit.storage.stage import (
    MARKER,
    STAGE_SUFFIX,
    UNLOCKED,
    discard,
    remove_abandoned,
    scratch,
    stage_beside,
    staged,
)
from lorafit.training.checkpoints import SEAL, commit, remove_committed, rotate

KILLED = """
import os, signal, sys
from pathlib import Path
from lorafit.storage.stage import staged
with staged(Path(sys.argv[1])) as made:
    (made / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_at_work(target: Path) -> Path:
    """What a process leaves that was killed while it made `target`."""
    subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    (stage,) = target.parent.glob(f".{target.name}.*{STAGE_SUFFIX}")
    return stage


def test_a_staged_directory_appears_whole(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as made:
        (made / "file").write_text("text")
        assert not (tmp_path / "out").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/file"]


def test_a_staged_directory_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as made:
        (made / "file").write_text("text")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_staged_directory_replaces_nothing_that_appeared_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), staged(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    stage = killed_at_work(tmp_path / "out")
    assert (stage / "out/half").is_file()
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_stage_of_a_process_at_work_is_left_alone(tmp_path: Path) -> None:
    with stage_beside(tmp_path / "out") as stage:
        remove_abandoned(tmp_path)
        assert (stage / MARKER).is_file()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "marker",
    ["", "[]", "{}", json.dumps({"host": socket.gethostname()}), json.dumps({"stage_of": "a", "host": "other"})],
)
def test_what_carries_no_marker_of_this_machine_stays(marker: str, tmp_path: Path) -> None:
    stage = tmp_path / f".out.0123456789abcdef{STAGE_SUFFIX}"
    stage.mkdir()
    (stage / MARKER).write_text(marker)
    remove_abandoned(tmp_path)
    assert stage.is_dir()


def test_a_directory_of_that_name_with_something_in_it_stays(tmp_path: Path) -> None:
    mine = tmp_path / f".out.0123456789abcdef{STAGE_SUFFIX}"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    remove_abandoned(tmp_path)
    assert (mine / "notes").read_text() == "mine"


@pytest.mark.parametrize("left", [[], [UNLOCKED]])
def test_a_stage_whose_maker_was_killed_before_it_was_marked_is_removed(left: list[str], tmp_path: Path) -> None:
    stage = tmp_path / f".out.0123456789abcdef{STAGE_SUFFIX}"
    stage.mkdir()
    for name in left:
        (stage / name).touch()
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["mkdir", "flock"])
def test_a_stage_that_another_removes_before_it_is_marked_is_made_again(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = (Path, Path.mkdir) if moment == "mkdir" else (fcntl, fcntl.flock)
    calls = []

    def another_comes(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        calls.append(arguments)
        if len(calls) == 1:
            remove_abandoned(tmp_path)

    monkeypatch.setattr(target, moment, another_comes)
    with staged(tmp_path / "out") as made:
        (made / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(calls) == {"mkdir": 3, "flock": 2}[moment]


def test_where_no_lock_can_tell_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = killed_at_work(tmp_path / "out")

    def not_there(*_: int) -> None:
        raise OSError(NOT_LOCKABLE[0], "No locks available")

    monkeypatch.setattr(fcntl, "flock", not_there)
    remove_abandoned(tmp_path)
    assert stage.is_dir()
    with staged(tmp_path / "other"):
        pass
    assert (tmp_path / "other").is_dir()


def test_a_link_in_a_stage_is_removed_and_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    with stage_beside(tmp_path / "out") as stage:
        (stage / "link").symlink_to(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").read_text() == "mine"


def test_a_file_is_replaced_in_one_step_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "a.json.tmp").write_text("mine")
    for content in ("old", "new", b"bytes"):
        write_file(tmp_path / "a.json", content)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "bytes", "a.json.tmp": "mine"}


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a.json", "old")

    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}


def test_what_a_killed_writer_left_goes_when_the_next_one_comes(tmp_path: Path) -> None:
    killed_at_work(tmp_path / "a.json")
    write_file(tmp_path / "other.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_a_file_is_written_into_no_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_file(tmp_path / "nowhere/a.json", "text")
    assert list(tmp_path.iterdir()) == []


def test_scratch_is_for_this_user_alone_and_goes_where_temporary_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch() as directory:
        assert directory.is_relative_to(tmp_path)
        assert list(directory.iterdir()) == []
        assert directory.parent.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []


def test_a_discarded_directory_is_gone_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "doomed/deep").mkdir(parents=True)
    discard(tmp_path / "doomed")
    assert list(tmp_path.iterdir()) == []


def checkpoint(directory: Path, step: int) -> None:
    stage = directory / "written"
    stage.mkdir(parents=True)
    (stage / "weights").write_text(str(step))
    commit(stage, directory / f"checkpoint-{step}", contents={"step": step, "best_step": None, "facts": {}})


def test_only_committed_checkpoints_are_rotated_away(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    (directory / "checkpoint-1").mkdir(parents=True)
    (directory / "checkpoint-2.tmp").mkdir()
    for step in (2, 3, 4):
        checkpoint(directory, step)
    rotate(directory, keep=2)
    assert {path.name for path in directory.iterdir()} == {
        *("checkpoint-1", "checkpoint-2.tmp"),
        *("checkpoint-3", "checkpoint-4"),
    }


def test_what_stands_in_the_place_of_a_checkpoint_is_set_aside(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    (directory / "checkpoint-1").mkdir(parents=True)
    (directory / "checkpoint-1/notes").write_text("mine")
    checkpoint(directory, 1)
    assert (tmp_path / "quarantine/checkpoint-1/notes").read_text() == "mine"
    assert (directory / "checkpoint-1" / SEAL).is_file()


def test_a_trial_gives_back_its_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one", 1)
    checkpoint(tmp_path / "other", 1)
    (tmp_path / "other/notes").write_text("mine")
    remove_committed(tmp_path / "one")
    remove_committed(tmp_path / "other")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["other", "other/notes"]


def test_an_empty_directory_that_was_there_before_the_run_stays(tmp_path: Path) -> None:
    mine, made = tmp_path / "mine", tmp_path / "made/by/the/run"
    mine.mkdir()
    for path in (mine, made):
        lock = RunLock(RunDir(path))
        lock.take()
        lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_maker_that_fails_leaves_the_stage_of_another_of_the_same_target(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    with staged(target) as first:
        (first / "weights").write_text("whole")
        with pytest.raises(ValueError), staged(target) as second:  # the same process: as two containers with one pid
            assert second != first
            raise ValueError
        remove_abandoned(tmp_path)
    assert (target / "weights").read_text() == "whole"


@pytest.mark.parametrize("whole", ["", "a\n", "a\nb\n", "x" * 5000 + "\n"])
@pytest.mark.parametrize("torn", ["", "half", "h" * 9000])
def test_half_a_line_at_the_end_is_cut_off(whole: str, torn: str, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text(whole + torn)
    cut_torn_line(path)
    assert path.read_text() == whole
