"""A plot as SVG: lines, dots with intervals, a band, marks. Small on purpose; one shape for all of them.

Colours come by class from `PLOT_STYLE`, so that the same drawing is right on light and dark paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lorafit.report.page.downsample import thinned
from lorafit.report.page.html import Html, element, joined
from lorafit.report.page.style import PLOT_STYLE
from lorafit.report.page.ticks import log_ticks, short, ticks

WIDE, NARROW = 680, 328
"""Widths, in CSS pixels, that the page shows on a desk and on a phone: letters are 12 pixels high on both."""

TOP, BOTTOM, LEFT, RIGHT = 28, 40, 52, 76
LABEL_HEIGHT = 30

ROUNDING = 1e-6
"""Of its values: what a curve may vary by and still be drawn as a flat line."""

Point = tuple[float, float]


class Interval(NamedTuple):
    """A dot with what it may be."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Values along x, named beside the last of them if it has a name."""

    name: str
    points: Sequence[Point] = ()
    kind: Literal["line", "marked", "bars", "faint"] = "line"
    intervals: Sequence[Interval] = ()


@dataclass(frozen=True)
class Plot:
    """What one plot shows; `name` is its file."""

    name: str
    title: str
    description: str
    """For those who do not see it, and beneath it: what is shown, from where to where."""
    x: str
    """Name and unit of an axis."""
    y: str
    series: tuple[Series, ...]
    height: int = 190
    is_log_x: bool = False
    is_log_y: bool = False
    x_ticks: tuple[float, ...] = ()
    """Where the x axis is labelled, when only certain values can be."""
    band: tuple[float, float] | None = None
    """Values of y that are as good as each other."""
    band_name: str = ""
    marks: tuple[float, ...] = ()
    """Places on x where something happened."""
    x_range: tuple[float, ...] = ()
    """What the x axis spans besides the values, so that several plots share one."""


@dataclass(frozen=True)
class _Scale:
    """Where a value lies, in pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        place = ((math.log10(value) if self.is_log else value) - low) / (high - low)
        return self.start + place * (self.end - self.start)


def figure(plot: Plot) -> Html:
    """The plot under its title, drawn for wide and for narrow paper; the page shows one of them."""
    drawings = [svg(plot, width=width, css=css) for width, css in ((WIDE, "wide"), (NARROW, "narrow"))]
    return element("figure", element("figcaption", plot.title), *drawings)


def svg_file(plot: Plot) -> str:
    """The plot as a file of its own."""
    return svg(plot, width=WIDE, css="", style=PLOT_STYLE)


def svg(plot: Plot, *, width: int, css: str, style: str = "") -> Html:
    """The drawing, `width` pixels wide where it is shown in its own size."""
    x, y = _scales(plot, width)
    parts = [
        *_named(plot, css),
        *([Html(f"<style>{style}text{{font-family:system-ui,'DejaVu Sans',sans-serif}}</style>")] if style else []),
        *_band(plot, x, y),
        *_axes(plot, x, y),
        *(_line(f"M{x(mark):.1f} {y.end:.1f}V{y.start:.1f}", "mark") for mark in plot.marks),
        *(part for index, series in enumerate(plot.series) for part in _drawn(series, index, x, y)),
        *_labels(plot, x, y),
    ]
    size = {"width": str(width), "height": str(plot.height)} if style else {}
    attributes = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {width} {plot.height}",
        "role": "img",
        "aria-labelledby": f"{plot.name}-{css or 'file'}-title {plot.name}-{css or 'file'}-desc",
        **size,
    }
    return element("svg", *parts, css=css, attributes=attributes)


def _named(plot: Plot, css: str) -> list[Html]:
    place = f"{plot.name}-{css or 'file'}"
    return [
        element("title", plot.title, attributes={"id": f"{place}-title"}),
        element("desc", plot.description, attributes={"id": f"{place}-desc"}),
    ]


def _scales(plot: Plot, width: int) -> tuple[_Scale, _Scale]:
    points = [point for series in plot.series for point in series.points]
    edges = [value for series in plot.series for one in series.intervals for value in (one.low, one.high)]
    xs = [*plot.x_range, *(point[0] for point in points)] + [
        one.x for series in plot.series for one in series.intervals
    ]
    has_bars = any(series.kind == "bars" for series in plot.series)
    ys = [point[1] for point in points] + edges + list(plot.band or ())
    x_low, x_high = _padded(xs, is_log=plot.is_log_x, share=0.04 if plot.x_ticks else 0.0)
    y_low, y_high = _padded(ys, is_log=plot.is_log_y, share=0.06)
    return (
        _Scale(x_low, x_high, LEFT, width - RIGHT, plot.is_log_x),
        _Scale(0.0 if has_bars else y_low, y_high, plot.height - BOTTOM, TOP, plot.is_log_y),
    )


def _padded(values: Sequence[float], *, is_log: bool, share: float) -> tuple[float, float]:
    """The range of the values and a little more, so that no line runs along an edge."""
    low, high = min(values), max(values)
    if is_log:
        factor = max((high / low) ** share, 1.1)
        return low / factor, high * factor
    is_flat = high - low <= ROUNDING * max(abs(low), abs(high))
    gap = (abs(high) * 0.05 or 1.0) if is_flat else (high - low) * share
    return low - gap, high + gap


def _axes(plot: Plot, x: _Scale, y: _Scale) -> Iterable[Html]:
    """Hairlines at the ticks of y, the ticks, and what the axes are."""
    for value in log_ticks(y.low, y.high) if y.is_log else ticks(y.low, y.high, most=5):
        yield _line(f"M{x.start:.1f} {y(value):.1f}H{x.end:.1f}", "grid")
        yield _text(short(value), x.start - 8, y(value) + 4, "tick", anchor="end")
    yield _line(f"M{x.start:.1f} {y.start:.1f}H{x.end:.1f}", "axis")
    fitting = max(2, int((x.end - x.start) / 50))
    places = list(plot.x_ticks) or (log_ticks(x.low, x.high) if x.is_log else ticks(x.low, x.high, most=fitting))
    for value in places:
        yield _line(f"M{x(value):.1f} {y.start:.1f}v4", "axis")
        yield _text(short(value), x(value), y.start + 17, "tick", anchor="middle")
    yield _text(plot.x, x.end, y.start + 35, "axis-name", anchor="end")
    yield _text(f"{plot.y}, log scale" if y.is_log else plot.y, 0, 12, "axis-name")


def _band(plot: Plot, x: _Scale, y: _Scale) -> Iterable[Html]:
    if plot.band is None:
        return
    low, high = plot.band
    corners = f"M{x.start:.1f} {y(high):.1f}H{x.end:.1f}V{y(low):.1f}H{x.start:.1f}Z"
    yield _line(corners, "band")
    yield _line(f"M{x.start:.1f} {y(high):.1f}H{x.end:.1f}", "edge")
    yield _text(plot.band_name, x.end - 4, y(high) - 4, "axis-name", anchor="end")


def _drawn(series: Series, index: int, x: _Scale, y: _Scale) -> Iterable[Html]:
    if series.kind == "bars":
        yield from (
            _line(f"M{x(at) - 7:.1f} {y.start:.1f}V{y(value):.1f}h14V{y.start:.1f}Z", f"dot{index}")
            for at, value in series.points
        )
    elif series.points:
        points = thinned(series.points, columns=int(x.end - x.start))
        path = "M" + "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value in points)
        yield _line(path, "faint" if series.kind == "faint" else f"line{index}")
    for one in series.intervals:
        at, low, high = x(one.x), y(one.low), y(one.high)
        ends = f"M{at - 4:.1f} {low:.1f}h8M{at - 4:.1f} {high:.1f}h8"
        yield _line(f"M{at:.1f} {low:.1f}V{high:.1f}{ends}", f"whisker{index}")
    dots = [*(series.points if series.kind == "marked" else ()), *((one.x, one.y) for one in series.intervals)]
    for at, value in dots:
        place = {"cx": f"{x(at):.1f}", "cy": f"{y(value):.1f}", "r": "3.2"}
        yield element("circle", css=f"dot{index}", attributes=place)


def _labels(plot: Plot, x: _Scale, y: _Scale) -> Iterable[Html]:
    """The name of each series and its last value, beside its end; moved apart where they would meet."""
    ends = []
    for index, series in enumerate(plot.series):
        if series.name:
            value = series.points[-1][1] if series.points else series.intervals[-1].y
            ends.append((y(value), index, series.name, value))
    ends.sort()
    lowest = y.start - 14 - LABEL_HEIGHT * (len(ends) - 1)
    before = -math.inf
    for rank, (place, index, name, value) in enumerate(ends):
        before = max(before + LABEL_HEIGHT, min(place, lowest + LABEL_HEIGHT * rank), y.end + 8)
        yield _text(name, x.end + 7, before - 2, f"name name{index}")
        yield _text(short(value), x.end + 7, before + 12, "value", further={"data-value": repr(value)})


def _line(path: str, css: str) -> Html:
    return element("path", css=css, attributes={"d": path})


def _text(
    words: str, x: float, y: float, css: str, *, anchor: str = "start", further: dict[str, str] | None = None
) -> Html:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    return element("text", joined([words]), css=css, attributes=place | (further or {}))
