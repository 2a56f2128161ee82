"""The part of the page that speaks of `lorafit eval`: what the adapter changed, with intervals, and samples."""

from __future__ import annotations

from lorafit.report.page.contents import Facts
from lorafit.report.page.html import Html


def evaluation(found: Facts) -> Html:
    """Losses, differences with their intervals, samples side by side."""
    return Html("")
