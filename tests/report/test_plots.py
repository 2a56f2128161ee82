"""The plots of a report, as files and in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.report.page.downsample import thinned
from lorafit.report.page.html import page
from lorafit.report.page.ticks import log_ticks, ticks
from lorafit.report.page.write_page import write_report
from support import chromium
from support.reports import write_run, write_sweep

SVG = "{http://www.w3.org/2000/svg}"


def test_every_plot_is_drawn_with_its_name_its_axes_and_its_last_values(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=50)
    write_sweep(tmp_path / "sweep")
    drawings: dict[str, ElementTree.Element] = {}
    for directory in (tmp_path / "run", tmp_path / "sweep"):
        write_report(directory, out=None, rows=0)
        drawings |= {file.stem: ElementTree.parse(file).getroot() for file in directory.glob("plots/*.svg")}
    curves, of_sweep = ("loss", "grad_norm", "learning_rate", "throughput"), ("rank_loss", "rank_difference", "tokens")
    assert set(drawings) == {*curves, *of_sweep, "spectrum"}
    for name, drawing in drawings.items():
        texts = ["".join(text.itertext()) for text in drawing.iter(f"{SVG}text")]
        about = {one.get("id"): one.text for part in ("title", "desc") for one in drawing.findall(f"{SVG}{part}")}
        assert len(about) == 2
        assert drawing.get("aria-labelledby") == " ".join(map(str, about)) and all(about.values())
        assert any("step" in text or "rank" in text for text in texts), name
        assert len([text for text in texts if re.fullmatch(r"[\d.e-]+( [kMG])?", text)]) >= 5, name
    labels = ["".join(text.itertext()) for text in drawings["loss"].iter(f"{SVG}text")]
    assert {"train", "held-out", "1.736", "nats per token"} <= set(labels)


def test_the_png_files_are_pictures(tmp_path: Path) -> None:
    write_report(write_run(tmp_path, steps=50).path, out=None, rows=0)
    for name in ("loss", "grad_norm", "learning_rate", "throughput"):
        picture = (tmp_path / f"plots/{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and int.from_bytes(picture[16:20], "big") == 1360
        assert len(picture) > 8_000  # white paper of this size is 3 kB


@given(
    st.lists(st.tuples(st.integers(0, 5_000), st.floats(-1e6, 1e6)), unique_by=lambda point: point[0]),
    st.integers(1, 50),
)
@settings(max_examples=100, deadline=None)
def test_thinning_keeps_ends_extremes_and_order(points: list[tuple[int, float]], columns: int) -> None:
    whole = [(float(x), y) for x, y in sorted(points)]
    kept = thinned(whole, columns=columns)
    assert len(kept) <= 4 * columns and kept == sorted(set(kept)) and set(kept) <= set(whole)
    if whole:
        assert (kept[0], kept[-1]) == (whole[0], whole[-1])
        values = [y for _, y in whole]
        assert {min(values), max(values)} <= {y for _, y in kept}


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e3), st.integers(2, 9))
@settings(max_examples=100, deadline=None)
def test_ticks_are_few_and_lie_within(low: float, share: float, most: int) -> None:
    width = share * max(abs(low), 1e-12)
    found = ticks(low, low + width, most=most)
    slack = 1e-8 * max(abs(low), width)
    assert len(found) <= most + 1 and all(low - slack <= tick <= low + width + slack for tick in found)


def test_a_flat_curve_is_drawn_and_so_is_one_that_varies_by_rounding(tmp_path: Path) -> None:
    values = (5e3, 5e3 + 1e-9, 5e3)
    lines = [json.dumps({"step": step, "loss": 2.0, "tokens_per_second": value}) for step, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_report(tmp_path, out=None, rows=0)
    for name in ("loss", "throughput"):
        drawing = (tmp_path / f"plots/{name}.svg").read_text()
        (path,) = re.findall(r'class="line0" d="M([^"]*)"', drawing)
        assert len({point.split()[1] for point in path.split("L")}) == 1 and drawing.count('class="tick"') >= 4


@given(st.floats(1e-12, 1e12), st.floats(1.1, 1e12))
@settings(max_examples=100, deadline=None)
def test_ticks_of_a_log_axis_are_few_and_lie_within(low: float, factor: float) -> None:
    found = log_ticks(low, low * factor)
    assert len(found) <= 8 and all(low <= tick <= low * factor for tick in found)


@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")
def test_a_browser_shows_the_page_without_a_complaint_or_a_request(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=400, text="plain <b>")
    write_sweep(tmp_path / "sweep")
    pages = [Path(write_report(tmp_path / name, out=None, rows=0).report) for name in ("run", "sweep")]
    paper = {}
    with chromium.browser() as browser:
        for file in pages:
            for width, scheme in ((1000, "light"), (1000, "dark"), (360, "light")):
                browser.open(file, width=width, scheme=scheme)
                assert browser.complaints() == [] and browser.requests() == [file.resolve().as_uri()]
                assert browser.value("document.documentElement.scrollWidth") == width
                assert browser.value("[...document.querySelectorAll('svg')].filter(e => e.clientWidth).length") >= 4
                picture = browser.screenshot(tmp_path / f"{file.parent.name}-{width}-{scheme}.png")
                paper[scheme] = browser.value("getComputedStyle(document.body).backgroundColor")
                assert len(picture) > 30_000
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}


@pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")
def test_the_browser_would_complain_of_a_script_and_of_a_request(tmp_path: Path) -> None:
    """So that the test above can fail: the same policy, with what it forbids."""
    file = tmp_path / "page.html"
    bad = "<script>window.ran = 1</script><img src='http://localhost/x.png'><p style='color:red'>"
    file.write_text(page("x").replace("</main>", f"{bad}</main>"), encoding="utf-8")
    with chromium.browser() as browser:
        browser.open(file, width=360)
        assert len(browser.complaints()) == 3 and browser.value("window.ran") is None
