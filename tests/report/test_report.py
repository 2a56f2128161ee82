"""`lorafit report` puts a run on one page: the numbers of its files, nothing that runs, nothing that loads."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.cli import _exit_code
from lorafit.data.preview import prepared_preview
from lorafit.data.preview_job import examples
from lorafit.errors import DataError, RunDirError
from lorafit.recipe import load
from lorafit.report.page import images
from lorafit.report.page import write_page as write_module
from lorafit.report.page.contents import Examples, read_contents, read_examples
from lorafit.report.page.html import element, page
from lorafit.report.page.write_page import MOST_BYTES, report_page, write_report
from lorafit.storage.run_dir import RunDir
from support.reports import RECIPE, write_run, write_sweep
from support.tiny import sums, write_jsonl

UNITS = {"": 1.0, "%": 0.01, "GiB": 2**30, "MB": 1e6, "s": 1.0, "min": 60.0, "h": 3600.0, "k": 1e3, "M": 1e6, "G": 1e9}
QUOTED = {"h1", "pre", "code", "time", "title", "desc", "style"}
"""Elements that hold text of others, or of a file, as it is."""


class Reading(HTMLParser):
    """What a page shows: its numbers, and the text around them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.prose = ""
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self._open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        attributes = self._open[-1][1] if self._open else {}
        value = attributes.get("value") or attributes.get("data-value")
        if value is not None:
            self.numbers.append((value, data))
        elif not any(tag in QUOTED or is_quoted(attributes) for tag, attributes in self._open):
            self.prose += data


def is_quoted(attributes: dict[str, str | None]) -> bool:
    return bool({"quote", "row", "tick", "said"} & set((attributes.get("class") or "").split()))


def written(directory: Path, *, rows: int = 0) -> str:
    """The page of a run."""
    return Path(write_report(directory, out=None, rows=rows).report).read_text(encoding="utf-8")


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(entry)
    elif isinstance(value, int | float):
        yield float(value)


def numbers_of_files(directory: Path) -> set[float]:
    """Every number in a JSON file, or a line of one, of a run."""
    lines = [line for file in directory.rglob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()]
    texts = [file.read_text(encoding="utf-8") for file in directory.rglob("*.json")] + lines
    return {number for text in texts for number in numbers_in(json.loads(text))}


def assert_shown_is_value(value: str, shown: str) -> None:
    """`1.52 GiB` is its value but for rounding to the digits shown."""
    figures, _, unit = shown.replace(",", "").partition(" ")
    digits = figures.partition("e")[0].partition(".")[2]
    exponent = int(figures.partition("e")[2] or 0)
    half = 0.5 * 10.0 ** (exponent - len(digits)) * UNITS[unit]
    whole = max(half, 0.0005 * abs(float(value)) if "data" not in shown and "." not in figures else 0.0)
    assert abs(float(figures) * UNITS[unit] - float(value)) <= (half if digits else whole) * 1.001, (value, shown)


@pytest.mark.parametrize("write", [write_run, write_sweep])
def test_every_number_on_the_page_is_one_of_the_files(tmp_path: Path, write: Any) -> None:
    """But for shares of tokens and sums over modules, which are worked out here again."""
    write(tmp_path / "run")
    read = Reading(written(tmp_path / "run"))
    manifest = json.loads(Path(tmp_path / "run/manifest.json").read_text()) if write is write_run else {}
    sides = [manifest["data"][side] for side in ("train", "eval")] if manifest else []
    modules = manifest.get("modules", [])
    derived = {side["trained_tokens"] / side["tokens"] for side in sides}
    derived |= {float(len(modules)), float(sum(module["parameters"] for module in modules))}
    known = numbers_of_files(tmp_path / "run")
    assert len(read.numbers) > 40
    for value, shown in read.numbers:
        assert float(value) in known or float(value) in derived, (value, shown)
        assert_shown_is_value(value, shown)
    prose = read.prose.replace("F1", "")
    assert not re.search(r"\d", prose), re.findall(r".{20}\d.{20}", prose)


def test_the_check_of_the_numbers_finds_a_wrong_one() -> None:
    assert_shown_is_value("18253611008", "17.00 GiB")
    for value, shown in (("1.7001", "1.7011"), ("18253611008", "17.01 GiB"), ("0.9990234375", "99.91 %")):
        with pytest.raises(AssertionError):
            assert_shown_is_value(value, shown)


HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</style></title></pre><svg onload=alert(1)>",
    "{{7*7}} ${x} javascript:alert(1) &lt;b&gt;",
    "a\x1b[31mred\x1b]0;title\x07\x00\x9b2J",
    "abc\u202edcba\u2066\u200f\ufeff\u2028",
    "\ud800 lone",
)
OWN_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "h4", "p", "span", "div", "section"),
    *("dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "data", "time", "pre", "code", "strong"),
    *("figure", "figcaption", "svg", "desc", "path", "text", "circle"),
}
OWN_ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "value", "data-value", "tabindex", "scope", "title"),
    *("id", "d", "x", "y", "cx", "cy", "r", "viewbox", "role", "xmlns", "aria-labelledby", "text-anchor"),
}


def assert_inert(text: str) -> None:
    """Nothing but our own markup, and no letter that steers a reader."""
    read = Reading(text)
    assert read.tags <= OWN_TAGS, read.tags - OWN_TAGS
    assert read.attributes <= OWN_ATTRIBUTES, read.attributes - OWN_ATTRIBUTES
    assert all(letter == "\n" or letter.isprintable() for letter in text)
    policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'; style-src 'sha256-")


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_strangers_is_inert_wherever_it_stands(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", steps=12, text="TEXT")
    write_sweep(tmp_path / "sweep", text="TEXT")
    for file in (*tmp_path.rglob("*.json"), *tmp_path.rglob("*.jsonl"), run.recipe):
        plain = text if file == run.recipe else json.dumps(text)[1:-1]
        file.write_text(file.read_text().replace("TEXT", plain), encoding="utf-8", errors="replace")
    token = {"text": text, "ids": [1], "is_trained": True, "is_stop": False}
    examples = Examples(({"where": f"{text}:1", "side": "train", "tokens": [token]},), (text,), "")
    for directory in (tmp_path / "run", tmp_path / "sweep"):
        shown = report_page(read_contents(directory), examples, [])
        assert_inert(shown)
        letters = re.search(r"alert\(1\)|red|dcba|lone", text)
        assert letters is not None and shown.count(letters[0]) >= 3


@given(st.text())
@settings(max_examples=150, deadline=None)
def test_any_text_is_inert_in_elements_attributes_and_titles(text: str) -> None:
    shown = page(text, element("p", text, css=text, attributes={"title": text}), element("pre", text))
    assert_inert(shown)
    assert Reading(shown).text.count("<script") == 3 * text.count("<script")


def test_a_hostile_directory_is_inert_on_the_page_and_in_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "<script>alert(1)<\x1b[31m\u202e"
    write_run(directory, steps=5)
    assert _exit_code(["report", str(directory), "--rows", "0"]) == 0
    assert_inert((directory / "report.html").read_text(encoding="utf-8"))
    assert _exit_code(["report", str(directory / "no")]) == 4
    said = capfd.readouterr()
    assert "\x1b" not in said.out + said.err and "\u202e" not in said.out + said.err
    assert "\\x1b[31m" in said.out and "\\x1b[31m" in said.err


def test_parts_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=9)
    shown = written(run.path)
    for heading in (
        "Training",
        "Health",
        "Data",
        "Merged model",
        "Machine and memory",
        "Adapter",
        "Recipe",
        "Versions",
    ):
        assert f"<h2>{heading}</h2>" in shown
    for file in (run.path / "eval.json", run.manifest, run.events, run.recipe, run.path / "merged/merge_report.json"):
        file.unlink()
    assert re.findall("<h2>(.*?)</h2>", written(run.path)) == ["Training"]
    assert "not ended" in written(run.path)


def test_a_run_that_stopped_and_a_step_that_is_not_finite_are_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20)
    with run.metrics.open("a") as lines:
        lines.write('{"step": 21, "loss": NaN, "grad_norm": Infinity}\n')
    run.write_manifest(json.loads(run.manifest.read_text()) | {"outcome": "stopped: NaN <b>"})
    read = Reading(written(run.path))
    assert "stopped: NaN <b>" in read.text and "Not finite, and not drawn, at step 21" in read.text
    assert "nan" not in written(run.path).replace("finance", "").lower().replace("stopped: nan", "")


def test_figures_of_a_step_done_again_count_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    entries = [(1, 3.0), (2, 2.5), (2, 2.25), (3, 2.0)]
    run.metrics.write_text("".join(f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in entries))
    write_report(tmp_path, out=None, rows=0)
    drawing = (tmp_path / "plots/loss.svg").read_text(encoding="utf-8")
    (path,) = re.findall(r'class="line0" d="([^"]*)"', drawing)
    assert path.count("L") == 2


def problems(directory: Path) -> list[str]:
    with pytest.raises(RunDirError) as error:
        write_report(directory, out=None, rows=0)
    assert error.value.exit_code == 4
    return [str(problem).replace(f"{directory}", "RUN") for problem in error.value.problems]


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path / "none") == ["RUN: is not a directory; name the output_dir of a run"]
    assert problems(tmp_path) == ["RUN: holds no run and no sweep; name the output_dir of one"]


def test_a_run_without_a_step_yet_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "metrics.jsonl").write_text("")
    assert problems(tmp_path) == ["RUN: no step is logged yet; report again when training has begun"]


def test_lines_that_are_broken_are_named_all_at_once(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=3)
    good = run.metrics.read_text().splitlines()[0]
    run.metrics.write_text(f'{good}\n{{"step": 1,}}\n[1]\n{{"loss": 2}}\n{good}\n')
    run.manifest.write_text('{\n"a": 1,\n oops}')
    run.events.write_bytes(b'{"step": 1, "message": "\xff"}\n')
    found = problems(tmp_path)
    assert [line.partition(" ")[0] for line in found] == [
        "RUN/manifest.json:3:",
        "RUN/metrics.jsonl:2:",
        "RUN/metrics.jsonl:3:",
        "RUN/metrics.jsonl:4:",
        "RUN/events.jsonl:",
    ]
    assert "is not JSON (" in found[1] and "remove the line" in found[1] and "not UTF-8" in found[-1]


def test_a_line_longer_than_any_is_named_and_not_put_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=3)
    before = len(run.events.read_text().splitlines())
    with run.events.open("a") as events:
        events.write(json.dumps({"step": 1, "kind": "stop", "message": "A" * 2**20}) + "\n")
    (line,) = problems(tmp_path)
    assert line.startswith(f"RUN/events.jsonl:{before + 1}: has 1,048,6") and line.endswith("remove the line")


@pytest.mark.parametrize("write", [write_run, write_sweep])
def test_a_file_of_another_structure_is_named_or_left_out(
    tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value of every JSON file in turn, down to the third level, is a number, a list or an object instead."""
    monkeypatch.setattr(images, "can_write_png", lambda: False)
    monkeypatch.setattr(write_module, "can_write_png", lambda: False)
    run = tmp_path / "run"
    write(run, **({"steps": 3} if write is write_run else {}))
    refused = 0
    for file in sorted(run.rglob("*.json")):
        text = file.read_text()
        for path, other in zip(places(json.loads(text)), cycle((3, [1], {}))):
            file.write_text(json.dumps(changed(json.loads(text), path, other)))
            try:
                write_report(run, out=None, rows=0)
            except RunDirError as error:
                refused += "Error: " in str(error)
        file.write_text(text)
    assert refused


def places(value: Any, depth: int = 3) -> Iterator[tuple[Any, ...]]:
    """The path to each value, of a list only to the first."""
    entries = (
        value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield (key,)
        if depth > 1:
            yield from ((key, *rest) for rest in places(inner, depth - 1))


def changed(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = other
    return value


def test_many_broken_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("oops\n" * 1000)
    assert len(problems(tmp_path)) == 11 and problems(tmp_path)[-1] == "RUN: and 990 more like this"


def test_a_line_that_is_being_written_is_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=5)
    with run.metrics.open("a") as lines:
        lines.write('{"step": 6, "lo')
    report = write_report(tmp_path, out=None, rows=0)
    assert report.notes == ("The last line of metrics.jsonl is not whole and was left out.",)


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=5)
    with pytest.raises(RunDirError, match="choose another --out"):
        write_report(tmp_path / "run", out=tmp_path / "no/such/page.html", rows=0)
    with pytest.raises(RunDirError, match="choose another --out"):
        write_report(tmp_path / "run", out=tmp_path, rows=0)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_hundred_thousand_steps_make_a_small_page_that_keeps_every_spike(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.metrics.open("w") as lines:
        for step in range(1, 100_001):
            loss = 9.75 if step == 54_321 else 1 + math.sin(step) / 3
            figures = {"loss": loss, "grad_norm": abs(math.cos(step)), "lr": 1e-4, "tokens_per_second": 5e3 + step % 97}
            lines.write(json.dumps({"step": step} | figures) + "\n")
    for step in range(500):
        run.add_event("health", "x" * 200, step=step, action="warn")
    report = write_report(tmp_path, out=None, rows=0)
    assert report.bytes < 600_000
    drawing = (tmp_path / "plots/loss.svg").read_text(encoding="utf-8")
    (path,) = re.findall(r'class="line0" d="M([^"]*)"', drawing)
    heights = [float(point.split()[1]) for point in path.split("L")]
    assert len(heights) <= 4 * 700 and sorted(heights)[1] - min(heights) > 50


def test_the_page_stays_small_whatever_is_in_it(tmp_path: Path) -> None:
    long = "y" * 5_000
    run = write_run(tmp_path / "run", steps=2000, text=long)
    run.recipe.write_text("# " + long * 100)
    token = {"text": long, "ids": [1], "is_trained": True, "is_stop": False}
    rows = tuple({"where": f"{long}:1", "side": "train", "tokens": [token] * 5000} for _ in range(40))
    examples = Examples(rows, (long,), "")
    contents = read_contents(run.path)
    assert len(report_page(contents, Examples((), (), ""), [])) < MOST_BYTES
    assert len(report_page(contents, examples, [])) > MOST_BYTES
    write_sweep(tmp_path / "sweep", modules=600)
    assert write_report(tmp_path / "sweep", out=None, rows=0).bytes < MOST_BYTES / 4


@pytest.fixture
def trained(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose data lies where its recipe says, and is what its manifest says."""
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    run = write_run(tmp_path / "run", steps=5)
    write_jsonl(tmp_path / "train.jsonl", sums(4))
    run.recipe.write_text(f"model: {{model_name_or_path: {tiny_base}}}\ndata: {{train: [{{path: ../train.jsonl}}]}}\n")
    fingerprint, _ = prepared_preview(load(run.recipe).recipe, rows=1, cache_dir=tmp_path / "cache")
    manifest = json.loads(run.manifest.read_text())
    run.write_manifest(manifest | {"data": manifest["data"] | {"fingerprint": fingerprint}})
    return run


def test_rows_are_shown_as_the_model_saw_them_and_torch_stays_out(trained: RunDir) -> None:
    asked = "code = _exit_code(['report', sys.argv[1], '--rows', '2', '--json']); print(sorted(sys.modules))"
    command = [sys.executable, "-c", f"import sys; from lorafit.cli import _exit_code; {asked}", str(trained.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    result, modules = done.stdout.splitlines()
    assert json.loads(result)["notes"] == [] and "'torch'" not in modules and "'numpy'" not in modules
    shown = trained.path.joinpath("report.html").read_text(encoding="utf-8")
    assert "train, train.jsonl:2" in shown and "train.jsonl:3" not in shown
    text = "".join(re.findall(r'<span class="trained[ a-z]*" title="[\d ]+">(.)</span>', shown))
    assert "Itis0." in text.replace(" ", "") and "Whatis" not in text.replace(" ", "")


def test_rows_that_are_no_longer_those_of_the_run_are_not_shown(trained: RunDir) -> None:
    assert len(examples(trained.path, 1)["rows"]) == 1
    write_jsonl(trained.path.parent / "train.jsonl", sums(5))
    with pytest.raises(RunDirError, match="no longer that of the run"):
        examples(trained.path, 1)
    trained.path.parent.joinpath("train.jsonl").unlink()
    with pytest.raises(DataError, match=r"train\.jsonl"):
        examples(trained.path, 1)
    shown = read_examples(read_contents(trained.path), rows=1)
    assert not shown.rows and "train.jsonl" in shown.missing


def test_the_reason_why_there_are_no_rows_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, steps=5)
    contents = "lorafit.report.page.contents"
    monkeypatch.setattr(f"{contents}.EXAMPLES_SECONDS", 0.01)
    report = write_report(run.path, out=None, rows=1)
    assert report.notes == ("No rows are shown: reading the data took more than 0.01 seconds",)
    assert "No rows are shown" in run.path.joinpath("report.html").read_text()


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", steps=5)
    out = tmp_path / "shared.html"
    assert _exit_code(["report", str(tmp_path / "run"), "--rows", "0", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: open it in a browser\n"
    assert out.is_file() and (tmp_path / "plots/loss.svg").is_file() and not (tmp_path / "run/report.html").exists()
    assert _exit_code(["report", str(tmp_path / "run"), "--rows", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == (tmp_path / "run/report.html").stat().st_size
    assert "plots/loss.svg" in result["plots"] and "plots/loss.png" in result["plots"]


def test_without_the_renderer_there_are_svg_files_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.report.page.write_page.can_write_png", lambda: False)
    assert images.can_write_png()
    report = write_report(write_run(tmp_path, steps=5).path, out=None, rows=0)
    assert {Path(name).suffix for name in report.plots} == {".svg"} and "lorafit[report]" in report.notes[0]
