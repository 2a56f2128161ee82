"""What a result was made with."""

from __future__ import annotations

from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lorafit

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


def made_with(command: str, *, device: str) -> dict[str, Any]:
    """Command, device, date and versions; lorafit may be on the path alone, and a package may be absent."""
    versions: dict[str, str | None] = {"lorafit": lorafit.__version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"command": command, "device": device, "date": date.today().isoformat(), "versions": versions}
