"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    name: str
    found: str
    mend: str = ""
    """What to type to mend it; empty when there is nothing to mend."""
    is_needed: bool = True
    """Whether training cannot work here until it is mended."""

    @property
    def is_broken(self) -> bool:
        """Whether training does not work here because of it."""
        return bool(self.mend) and self.is_needed

    def as_dict(self) -> dict[str, str | bool]:
        """For JSON."""
        state = "mend" if self.mend else "ok"
        return {"name": self.name, "state": state, "found": self.found, "mend": self.mend, "needed": self.is_needed}
