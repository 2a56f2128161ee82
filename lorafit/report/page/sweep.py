"""The part of the page that speaks of a rank sweep."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.report.page.contents import Contents
from lorafit.report.page.html import Html
from lorafit.report.page.plot import Plot


def sweep_plots(contents: Contents) -> list[Plot]:
    """Loss against rank, tokens trained, singular values."""
    return []


def sweep(contents: Contents, plots: Sequence[Plot]) -> Html:
    """The chosen rank, and how each was decided."""
    return Html("")
