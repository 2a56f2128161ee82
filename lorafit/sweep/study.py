"""The trials of a sweep in an Optuna storage: who trains what, and what came of it.

Each piece of work is an Optuna trial. It is begun by one process, which says every few seconds that it is alive, and is
complete or does not count. A journal file, or any database that Optuna reaches by its URL.
"""

from __future__ import annotations

import base64
import os
import threading
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from lorafit.errors import MachineError
from lorafit.storage.files import cut_torn_line
from lorafit.storage.lease import BEAT_SECONDS, is_alive, this_host
from lorafit.tasks.sequences import SequenceLosses

_LIFE = uuid.uuid4().hex
"""Of this process: its number may have been that of one which died."""

PIECE = 32_000
"""Characters of one attribute: MySQL keeps 65,535 bytes."""


@dataclass(frozen=True)
class Outcome:
    """What one piece of work came to."""

    key: str
    facts: Mapping[str, Any]
    losses: Mapping[str, SequenceLosses]


@contextmanager
def storage_is_there(storage: str) -> Iterator[None]:
    """What a database raises when it cannot be reached, in one line without its password. Raises MachineError."""
    try:
        yield
    except UpdateFinishedTrialError:
        raise
    except (OptunaError, SQLAlchemyError, ImportError, OSError) as error:
        cause: BaseException = error.__cause__ or error
        said = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        mend = "install its driver" if isinstance(cause, ImportError) else "start the database"
        raise MachineError(
            f"this storage cannot be reached ({said}); {mend}, or leave --storage out for a journal file",
            where=_without_password(storage),
        ) from error


def _without_password(storage: str) -> str:
    try:
        return make_url(storage).render_as_string(hide_password=True) if "://" in storage else storage
    except ArgumentError:
        return storage.partition("://")[0] + "://..."


class Study:
    """The work of one sweep, shared by all processes that name the same storage."""

    def __init__(self, storage: str, name: str) -> None:
        """`storage` is a URL, or the path of a journal file. Raises MachineError."""
        self._where = storage
        self._last_beats: dict[int, tuple[Any, float]] = {}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with storage_is_there(storage), _without_notices():
            self.storage, self.study = _opened(storage, name)
        self._id = self.study._study_id

    def outcomes(self) -> dict[str, Outcome]:
        """Key to what was committed under it; the first that was, where a slow process was taken for dead."""
        found: dict[str, Outcome] = {}
        for trial in self._trials(TrialState.COMPLETE):
            key = trial.user_attrs["key"]
            found.setdefault(key, Outcome(key, trial.user_attrs["facts"], _unpacked(trial.user_attrs)))
        return found

    def claim(self, key: str) -> Claim | None:
        """The right to do this piece of work; None while a living process has it, or when it is done."""
        with storage_is_there(self._where), _without_notices():
            if any(trial.user_attrs["key"] == key for trial in self._trials(TrialState.COMPLETE)):
                return None
            if any(self._is_alive(trial) for trial in self._running(key)):
                return None
            who = {"host": this_host(), "process": os.getpid(), "life": _LIFE, "beat": 0}
            template = create_trial(state=TrialState.RUNNING, user_attrs={"key": key, **who})
            trial_id = self.storage.create_new_trial(self._id, template_trial=template)
            # Numbers are given one after the other: of two that claim at the same time the lower one has it.
            number = self.storage.get_trial_number_from_id(trial_id)
            rivals = [trial for trial in self._running(key) if trial.number < number]
            done = any(trial.user_attrs["key"] == key for trial in self._trials(TrialState.COMPLETE))
            if done or any(self._is_alive(trial) for trial in rivals):
                self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
                return None
            for trial in rivals:
                self._bury(trial)
        return Claim(self, trial_id)

    def _bury(self, trial: FrozenTrial) -> None:
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _trials(self, state: TrialState) -> Sequence[FrozenTrial]:
        with storage_is_there(self._where):
            trials = self.storage.get_all_trials(self._id, deepcopy=False, states=(state,))
        return sorted((trial for trial in trials if "key" in trial.user_attrs), key=lambda trial: trial.number)

    def _running(self, key: str) -> list[FrozenTrial]:
        return [trial for trial in self._trials(TrialState.RUNNING) if trial.user_attrs["key"] == key]

    def _is_alive(self, trial: FrozenTrial) -> bool:
        """Its process exists, where it is of this machine, and has moved its counter lately, by our clock."""
        who, now = trial.user_attrs, time.monotonic()
        if who["process"] == os.getpid() and who["host"] == this_host():
            return bool(who["life"] == _LIFE)
        seen, since = self._last_beats.get(trial.number, (None, now))
        if who["beat"] != seen:
            since = now
        self._last_beats[trial.number] = (who["beat"], since)
        return is_alive(who["process"], host=who["host"], started=None, silent_seconds=now - since)


@dataclass
class Claim:
    """A piece of work that this process is doing."""

    study: Study
    trial_id: int
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Claim:
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                self.study.storage.set_trial_user_attr(self.trial_id, "beat", beat)
            except (OptunaError, SQLAlchemyError, OSError):
                continue  # the commit says what is wrong, if it still is then

    def commit(self, facts: Mapping[str, Any], losses: Mapping[str, SequenceLosses]) -> bool:
        """Make it count; False where this process was taken for dead and another has begun the work anew."""
        with storage_is_there(self.study._where):
            try:
                for name, value in {"facts": dict(facts), **_packed(losses)}.items():
                    self.study.storage.set_trial_user_attr(self.trial_id, name, value)
                self.study.storage.set_trial_state_values(self.trial_id, TrialState.COMPLETE, [0.0])
            except UpdateFinishedTrialError:
                return False
        return True

    def give_up(self) -> None:
        """Let another process have it."""
        with storage_is_there(self.study._where):
            try:
                self.study.storage.set_trial_state_values(self.trial_id, TrialState.FAIL)
            except UpdateFinishedTrialError:
                return


class _WholeLines(JournalFileSymlinkLock):
    """The lock of a journal's writers. A process that died in a line left half of it: nobody reads that, but the next
    line would be taken for its end, and no process could read the journal again (optuna 5.0, `read_logs`)."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = Path(path)

    def acquire(self) -> bool:
        is_held = super().acquire()
        if is_held:
            try:
                cut_torn_line(self._path)
            except BaseException:
                self.release()
                raise
        return is_held


def _opened(storage: str, name: str, *, tries: int = 4) -> tuple[BaseStorage, optuna.Study]:
    """Of two processes that make the tables of a new database at the same time, one fails and finds them made."""
    try:
        if "://" in storage:
            opened = get_storage(storage)
        else:
            path = Path(storage).absolute()  # the lock file is a link to it
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = JournalStorage(JournalFileBackend(str(path), lock_obj=_WholeLines(str(path))))
        return opened, optuna.create_study(storage=opened, study_name=name, load_if_exists=True)
    except (OptunaError, SQLAlchemyError):
        if tries == 1:
            raise
        time.sleep(0.3)
        return _opened(storage, name, tries=tries - 1)


@contextmanager
def _without_notices() -> Iterator[None]:
    """Optuna announces what is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _packed(losses: Mapping[str, SequenceLosses]) -> dict[str, str]:
    """Attributes that hold the arrays to the last bit, in pieces."""
    pieces = {}
    for name, of in losses.items():
        for part in ("nll", "tokens", "correct"):
            text = base64.b85encode(zlib.compress(np.ascontiguousarray(getattr(of, part)).tobytes())).decode()
            for index, start in enumerate(range(0, len(text), PIECE)):
                pieces[f"losses/{name}/{part}/{index}"] = text[start : start + PIECE]
    return pieces


def _unpacked(attributes: Mapping[str, Any]) -> dict[str, SequenceLosses]:
    pieces: dict[tuple[str, str], dict[int, str]] = {}
    for attribute, text in attributes.items():
        if attribute.startswith("losses/"):
            _, name, part, index = attribute.split("/")
            pieces.setdefault((name, part), {})[int(index)] = text
    arrays: dict[str, dict[str, Any]] = {}
    for (name, part), texts in pieces.items():
        raw = zlib.decompress(base64.b85decode("".join(texts[index] for index in sorted(texts))))
        arrays.setdefault(name, {})[part] = np.frombuffer(raw, np.float64 if part == "nll" else np.int64)
    return {name: SequenceLosses(**parts) for name, parts in arrays.items()}
