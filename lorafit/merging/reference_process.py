"""The process that computes what base and adapter have to give. No torch."""

from __future__ import annotations

from lorafit.launching.child import Child


def reference_process() -> Child:
    """One that imports what it needs, and waits for what is to be verified."""
    return Child("lorafit.merging.verify_reference:reference", waits=True)
