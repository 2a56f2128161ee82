"""Starts the probes and reads what they say, for as long as they may take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answers:
    """What a probe said, by stage; and the stage in which it ended or was ended, if it did not get through."""

    stages: dict[str, dict[str, Any]]
    stopped_in: str = ""
    why: str = ""

    def error(self, stage: str) -> str:
        """What went wrong in a stage; empty when it went well."""
        if self.stopped_in == stage:
            return self.why
        if stage not in self.stages:
            return f"not reached: {self.stopped_in} {self.why}"
        return str(self.stages[stage].get("error", ""))


class Probe:
    """One probe that has been started."""

    def __init__(self, about: str, *, seconds: float) -> None:
        command = [sys.executable, "-m", "lorafit.doctor.probe", about]
        self._seconds = seconds
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def answers(self) -> Answers:
        """Wait for it, at most its seconds; then it is ended."""
        why = ""
        try:
            said, _ = self._process.communicate(timeout=self._seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said, _ = self._process.communicate()
            why = f"gave no answer in {self._seconds:g} s"
        found = [json.loads(line) for line in said.splitlines()]
        stages = {answer["stage"]: answer for answer in found if "begins" not in answer}
        last = found[-1]["stage"] if found else "start"
        if last in stages:
            return Answers(stages)
        code = self._process.returncode
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return Answers(stages, last, why or ended)
