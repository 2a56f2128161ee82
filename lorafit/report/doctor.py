"""`lorafit doctor` on a terminal."""

from __future__ import annotations

from lorafit.doctor.examine import Diagnosis
from lorafit.report.escape_control import inert


def doctor_text(diagnosis: Diagnosis) -> str:
    """A line for each thing, what mends it beneath it, and whether training works here."""
    width = max(len(line.name) for line in diagnosis.lines)
    shown = []
    for line in diagnosis.lines:
        shown.append(f"{'mend' if line.mend else 'ok':<4}  {line.name:<{width}}  {line.found}")
        if line.mend:
            shown.append(f"{'':4}  {'':{width}}  -> {line.mend}")
    broken = [line.name for line in diagnosis.lines if line.is_broken]
    verdict = f"training does not work here until mended: {', '.join(broken)}" if broken else "training works here"
    return inert("\n".join([*shown, "", verdict]))
