"""The names on disk of one run, and whether a directory may become one."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorafit.errors import RunDirError
from lorafit.storage.files import append_line, read_regular, sha256_of, write_file
from lorafit.storage.stage import flush, make_directory, remove_abandoned

LONGEST_LINE = 2**20
"""Bytes of a line of metrics.jsonl or events.jsonl: a thousand times what is written there. Longer: not ours."""


@dataclass(frozen=True)
class RunDir:
    """One run directory: the only thing commands share."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; its relative paths are relative to this directory."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """Versions, seed, hashes, times, outcome."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """Every logged step, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened besides the steps, one JSON object a line: warnings of health, stops, resumes."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the trainer."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """Who trains here at the moment; see `run_lock`."""
        return self.path / "run.lock"

    @property
    def adapter(self) -> Path:
        """The plain PEFT adapter."""
        return self.path / "adapter"

    @property
    def quarantine(self) -> Path:
        """Checkpoints that were damaged, set aside."""
        return self.path / "quarantine"

    def is_begun(self) -> bool:
        """Whether a run of ours has left something here that it could go on from."""
        return self.recipe.is_file() or self.checkpoints.is_dir()

    def events_of(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, oldest first; a line that was cut off by a kill is none."""
        lines = read_regular(self.events).split(b"\n") if self.events.is_file() else []
        return [event for line in lines if (event := _event(line)) and event["kind"] == kind]

    def set_torn_events_aside(self) -> int:
        """Move the lines of events.jsonl that are no events, as a kill or a bad disk leaves them, to the quarantine.

        So that the next event begins a line of its own. How many there were.
        """
        remove_abandoned(self.path)  # of a process that was killed at this, after the lines were whole again
        lines = read_regular(self.events).split(b"\n") if self.events.is_file() else []
        torn = [line for line in lines if line.strip() and not _event(line)]
        if torn or lines[-1:] not in ([], [b""]):
            whole = [line for line in lines if _event(line)]
            if torn:
                make_directory(self.quarantine)
                with (self.quarantine / self.events.name).open("ab") as aside:
                    aside.write(b"".join(line + b"\n" for line in torn))
            write_file(self.events, "".join(line.decode() + "\n" for line in whole))
        return len(torn)

    def add_event(
        self,
        kind: str,
        message: str,
        *,
        step: int,
        rule: str | None = None,
        action: str | None = None,
        figures: dict[str, float] | None = None,
    ) -> None:
        """Append one event; by one process alone."""
        event = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "kind": kind,
            "rule": rule,
            "action": action,
            "message": message,
            "figures": figures or {},
        }
        append_line(self.events, json.dumps(event, ensure_ascii=False))

    def adapter_hashes(self) -> dict[str, str]:
        """SHA-256 of each file of the adapter, by which a later command knows that it is as training left it."""
        files = sorted(path for path in self.adapter.iterdir() if path.is_file())
        return {path.name: sha256_of(path) for path in files}

    def refuse_used(self) -> None:
        """A run directory is never overwritten: it must be absent, or empty but for the lock, and writable.

        Raises RunDirError.
        """
        self.refuse_unusable()
        if self.path.is_dir() and any(path != self.lock for path in self.path.iterdir()):
            mend = "choose another output_dir (`--set output_dir=...`)"
            message = f"already holds a run; `lorafit train RECIPE --resume` goes on with it, or {mend}"
            message = message if self.is_begun() else f"already holds other files; {mend}"
            raise RunDirError(message, where=str(self.path))

    def refuse_unusable(self) -> None:
        """It must be a directory one can write into, or a name that can become one. Raises RunDirError."""
        where = str(self.path)
        if self.path.is_symlink() and not self.path.exists():
            raise RunDirError("is a broken link; choose another output_dir", where=where)
        if self.path.exists() and not self.path.is_dir():
            raise RunDirError("is a file; choose another output_dir", where=where)
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise RunDirError(f"{parent} is a file; choose another output_dir", where=where)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RunDirError(f"{parent} is not writable; choose another output_dir", where=where)

    def write_manifest(self, facts: dict[str, Any]) -> None:
        """Replace the manifest in one step, so that a reader sees the old one or the new one; after what it sums up."""
        for lines in (self.metrics, self.events):
            if lines.is_file():
                flush(lines)
        write_file(self.manifest, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _event(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None where it is not whole, or longer than any."""
    if len(line) > LONGEST_LINE:
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8 is a ValueError, too
        return None
    return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None
