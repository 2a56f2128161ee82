"""`lorafit doctor`: every line, and whether training works here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import __version__
from lorafit.doctor import machine, surroundings
from lorafit.doctor.diagnosis import Line
from lorafit.doctor.probe_answers import Answers, answers, probe
from lorafit.doctor.scrub import scrubbed_values

TORCH_SECONDS = 90.0
"""Importing torch from a cold network disk takes this long; a driver that hangs takes for ever."""

HUB_SECONDS = 10.0


@dataclass(frozen=True)
class Diagnosis:
    """All lines, in the order they are shown."""

    lines: tuple[Line, ...]
    environment: dict[str, str]

    @property
    def works(self) -> bool:
        """Whether nothing that training needs is broken."""
        return not any(line.is_broken for line in self.lines)

    def as_dict(self) -> dict[str, Any]:
        """The result for scripts."""
        return {
            "works": self.works,
            "lorafit": __version__,
            "platform": machine.platform_name(),
            "lines": [line.as_dict() for line in self.lines],
            "environment": self.environment,
        }


def cache_mend(cache: Path) -> str:
    """A cache that holds something is read where it cannot be written to: another `HF_HOME` would lose it."""
    if not (cache / "hub").is_dir():
        return "free some space, or `export HF_HOME=DIR` on another disk"
    return "free some space, or `export LORAFIT_CACHE=DIR` on another disk for what runs prepare; what it holds is read"


def examine(*, torch_seconds: float = TORCH_SECONDS, hub_seconds: float = HUB_SECONDS) -> Diagnosis:
    """Look at everything; what takes long runs side by side."""
    torch = probe("torch")
    source = surroundings.token_source(os.environ)
    asks_hub = source and not surroundings.is_offline()
    hub = probe("hub") if asks_hub else None
    driver = machine.nvidia_driver()
    cache = surroundings.hub_cache()
    lines = [machine.python_line(), *machine.library_lines()]
    disks = [
        machine.disk_line("disk here", Path.cwd(), mend="free some space, or `--set output_dir=DIR` on another disk"),
        machine.disk_line("hub cache", cache, mend=cache_mend(cache)),
    ]
    said: Answers | None = answers(hub, seconds=hub_seconds) if hub else None
    login = surroundings.login_line(source, said)
    around = [login, *surroundings.accelerate_lines(os.environ), surroundings.port_line()]
    lines += [*machine.device_lines(answers(torch, seconds=torch_seconds), driver), *disks, *around]
    return Diagnosis(tuple(lines), scrubbed_values(surroundings.shown_environment(os.environ)))
