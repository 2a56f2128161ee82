"""What a process comes to that works for a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafit.errors import VerificationError
from lorafit.launching.child import Child, ChildFailed


def child_answer(child: Child, *, what: str, where: Path) -> Any:
    """Its answer. Raises the LorafitError it ends with, and VerificationError (`what`) where it ends otherwise."""
    try:
        return child.answer()
    except ChildFailed as error:
        raise VerificationError(f"{what}: {error.reason}", where=str(where)) from error
