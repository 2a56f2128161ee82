"""The trials of a sweep in their storage: claimed once, taken over from the dead, kept to the last bit."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from lorafit.errors import MachineError
from lorafit.sweep import study as studies
from lorafit.sweep.study import Study
from lorafit.tasks.sequences import SequenceLosses
from support.forked import Child


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return str(tmp_path / "study.journal")


def losses(count: int = 5) -> SequenceLosses:
    random = np.random.default_rng(0)
    return SequenceLosses(random.normal(size=count), np.arange(1, count + 1), np.arange(count))


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_what_is_committed_comes_back_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    storage = str(tmp_path / "study.journal") if kind == "journal" else f"sqlite:///{tmp_path / 'study.db'}"
    # 20,000 sequences are more than one attribute holds
    with Study(storage, "s").claim("a") as claim:  # type: ignore[union-attr]
        assert claim.commit({"rank": 4, "failed": "x"}, {"3": losses(), "cut-2": losses(20_000)})
    outcome = Study(storage, "s").outcomes()["a"]
    assert outcome.facts == {"rank": 4, "failed": "x"}
    assert outcome.losses.keys() == {"3", "cut-2"}
    for name, expected in {"3": losses(), "cut-2": losses(20_000)}.items():
        assert outcome.losses[name].nll.tobytes() == expected.nll.tobytes()
        assert np.array_equal(outcome.losses[name].tokens, expected.tokens)
        assert np.array_equal(outcome.losses[name].correct, expected.correct)


def test_work_is_claimed_once_and_done_once(storage: str) -> None:
    one, other = Study(storage, "s"), Study(storage, "s")
    with one.claim("a") as claim:  # type: ignore[union-attr]
        assert other.claim("a") is None
        assert other.claim("b") is not None
        assert other.outcomes() == {}
        claim.commit({}, {})
    assert other.claim("a") is None and one.outcomes().keys() == {"a"}


@pytest.mark.parametrize("left", [1, 30, -1])
def test_half_a_line_of_a_process_that_died_in_it_is_no_line(left: int, storage: str) -> None:
    Study(storage, "s").claim("a").commit({}, {})  # type: ignore[union-attr]
    whole = Path(storage).read_bytes()
    last = whole.splitlines()[-1]
    Path(storage).write_bytes(whole + last[:left])
    assert Study(storage, "s").outcomes().keys() == {"a"}
    Study(storage, "s").claim("b").commit({}, {})  # type: ignore[union-attr]
    assert Study(storage, "s").outcomes().keys() == {"a", "b"}
    assert Path(storage).read_bytes().startswith(whole + b"{")


def test_work_that_was_given_up_can_be_had(storage: str) -> None:
    study = Study(storage, "s")
    study.claim("a").give_up()  # type: ignore[union-attr]
    assert study.claim("a") is not None


def test_other_sweeps_in_the_same_storage_are_none_of_ours(storage: str) -> None:
    with Study(storage, "s").claim("a") as claim:  # type: ignore[union-attr]
        claim.commit({}, {})
    other = Study(storage, "t")
    assert other.outcomes() == {} and other.claim("a") is not None


def test_of_many_processes_that_claim_at_once_one_has_the_work(tmp_path: Path) -> None:
    storage, start = str(tmp_path / "study.journal"), time.time() + 1.0
    Study(storage, "s")

    def compete() -> None:
        study = Study(storage, "s")
        time.sleep(max(0.0, start - time.time()))
        won = [key for key in map(str, range(5)) if study.claim(key) is not None]
        (tmp_path / f"{os.getpid()}.won").write_text("".join(won))
        time.sleep(1.5)  # alive until all have asked

    children = [Child(compete, log=tmp_path / f"{number}.log") for number in range(4)]
    for child in children:
        assert child.wait() == 0, child.said()
    assert sorted("".join(file.read_text() for file in tmp_path.glob("*.won"))) == list("01234")


def test_processes_that_open_a_new_database_at_once_all_find_it(tmp_path: Path) -> None:
    start = time.time() + 1.0

    def open_it() -> None:
        time.sleep(max(0.0, start - time.time()))
        assert Study(f"sqlite:///{tmp_path / 'study.db'}", "s").outcomes() == {}

    children = [Child(open_it, log=tmp_path / f"{number}.log") for number in range(3)]
    assert [child.wait() for child in children] == [0] * 3


def test_the_work_of_a_dead_process_is_taken_over_at_once(storage: str, tmp_path: Path) -> None:
    Study(storage, "s")

    def die() -> None:
        assert Study(storage, "s").claim("a") is not None
        os.kill(os.getpid(), signal.SIGKILL)

    assert Child(die, log=tmp_path / "log").wait() == -signal.SIGKILL
    assert Study(storage, "s").claim("a") is not None


def test_a_process_of_another_machine_is_dead_when_its_counter_stands_still(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "this_host", lambda: "elsewhere")
    monkeypatch.setattr(studies, "BEAT_SECONDS", 0.02)
    far = Study(storage, "s")
    claim = far.claim("a")
    assert claim is not None
    monkeypatch.setattr(studies, "this_host", lambda: "here")
    near = Study(storage, "s")
    monkeypatch.setattr("lorafit.storage.lease.SILENCE_SECONDS", 0.4)
    with claim:
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            assert near.claim("a") is None, "it beats"
            time.sleep(0.05)
    assert near.claim("a") is None
    time.sleep(0.5)
    mine = near.claim("a")
    assert mine is not None
    assert not claim.commit({"by": "far"}, {}), "it was taken for dead"
    assert mine.commit({"by": "near"}, {})
    assert far.outcomes()["a"].facts == {"by": "near"}


def test_a_storage_that_cannot_be_reached_is_one_line_without_its_password(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        missing = tmp_path / "nowhere" / "study.db"
        (tmp_path / "file").write_text("")
        for storage in (
            f"sqlite:///{missing}",
            "nosuchdb://user:secret@127.0.0.1/x",
            "postgresql://user:secret@127.0.0.1:1/x",
            "://",
            str(tmp_path / "file" / "study.journal"),
        ):
            with pytest.raises(MachineError) as caught:
                Study(storage, "s")
            (problem,) = caught.value.problems
            assert "cannot be reached" in str(problem) and "\n" not in str(problem) and "secret" not in str(problem)
    assert caught.value.exit_code == 4
