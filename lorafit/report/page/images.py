"""Plots as files, for slides and messages."""

from __future__ import annotations

import importlib
import importlib.util

from lorafit.report.page.plot import Plot, svg_file

PNG_SCALE = 2
"""Pixels of the PNG per CSS pixel: sharp on the screens of today. resvg_py 0.3 takes whole ones only."""


def can_write_png() -> bool:
    """Whether the extra `report` is installed: resvg, a small renderer of SVG without further dependencies."""
    return importlib.util.find_spec("resvg_py") is not None


def plot_files(plots: list[Plot], *, with_png: bool) -> dict[str, bytes]:
    """Name to content: each plot as SVG and, on white paper, as PNG."""
    files = {}
    for plot in plots:
        drawing = svg_file(plot)
        files[f"{plot.name}.svg"] = f"{drawing}\n".encode()
        if with_png:
            resvg = importlib.import_module("resvg_py")
            files[f"{plot.name}.png"] = bytes(
                resvg.svg_to_bytes(svg_string=drawing, background="#ffffff", zoom=PNG_SCALE)
            )
    return files
