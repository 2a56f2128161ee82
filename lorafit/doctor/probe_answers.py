"""What the probes said, for as long as they may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.launching.child import Child


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


def probe(about: str) -> Child:
    """A process that asks `torch` or the `hub`."""
    return Child("lorafit.doctor.probe:ask", about)


def answers(probe: Child, *, seconds: float) -> Answers:
    """Wait for them, at most so many seconds; then the probe is ended."""
    ended = probe.ended(seconds=seconds)
    found = [message for message in ended.messages if isinstance(message, dict)]
    stages = {answer["stage"]: answer for answer in found if "begins" not in answer}
    last = found[-1]["stage"] if found else "start"
    if last in stages:
        return Answers(stages)
    if ended.is_late:
        return Answers(stages, last, f"gave no answer in {seconds:g} s")
    why = f"was ended by signal {-ended.code}" if ended.code < 0 else f"ended with exit code {ended.code}"
    return Answers(stages, last, why)
