"""`lorafit report`: everything a run or a sweep left, on one page and as plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorafit.errors import RunDirError
from lorafit.report.page import run, sweep
from lorafit.report.page.contents import Contents, Examples, read_contents, read_examples
from lorafit.report.page.evaluation import evaluation
from lorafit.report.page.html import Html, element, page, section
from lorafit.report.page.images import can_write_png, plot_files
from lorafit.report.page.plot import Plot
from lorafit.storage.files import write_file

MOST_BYTES = 2_000_000
MOST_RECIPE = 60_000


@dataclass(frozen=True)
class Report:
    """What was written; the JSON of `lorafit report`."""

    report: str
    bytes: int
    plots: tuple[str, ...]
    notes: tuple[str, ...]
    """What is left out, and why."""


def write_report(path: Path, *, out: Path | None, rows: int) -> Report:
    """Write the page, and the plots into `plots/` beside it. `rows` of each side are shown as tokens.

    Raises RunDirError for what is no run, or is broken, or cannot be written.
    """
    contents = read_contents(path)
    target = path / "report.html" if out is None else out
    examples = read_examples(contents, rows=rows)
    try:
        plots = [*run.curve_plots(contents), *sweep.sweep_plots(contents)]
        text = report_page(contents, examples, plots).encode("utf-8", "backslashreplace")
        if len(text) > MOST_BYTES:
            text = report_page(contents, Examples((), (), "they would make this page too large"), plots).encode()
        files = plot_files(plots, with_png=can_write_png())
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        message = f"a file in it is not as it was written ({type(error).__name__}: {error}); --debug shows where"
        raise RunDirError(message, where=str(path)) from error
    try:
        if files:
            (target.parent / "plots").mkdir(exist_ok=True)
        write_file(target, text)
        for name, content in files.items():
            write_file(target.parent / "plots" / name, content)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError) as error:
        raise RunDirError(f"cannot be written ({error.strerror}); choose another --out", where=str(target)) from None
    notes = [*contents.notes, *([f"No rows are shown: {examples.missing}"] if examples.missing else [])]
    if plots and not can_write_png():
        notes.append("No PNG files: pip install 'lorafit[report]'")
    return Report(str(target), len(text), tuple(f"plots/{name}" for name in files), tuple(notes))


def report_page(contents: Contents, examples: Examples, plots: list[Plot]) -> str:
    """The whole page; parts of which nothing is known are not there."""
    curves = [plot for plot in plots if plot.name in run.CURVES]
    of_sweep = [plot for plot in plots if plot.name not in run.CURVES]
    return page(
        f"{contents.path.resolve().name} - lorafit",
        run.summary(contents),
        *(element("p", note, css="quiet") for note in contents.notes),
        sweep.sweep(contents, of_sweep),
        evaluation(contents.evaluation, contents.task),
        run.training(contents, curves),
        run.health(contents),
        run.data(contents, examples),
        run.merges(contents),
        run.memory(contents),
        run.adapter(contents),
        _recipe(contents),
        run.versions(contents),
    )


def _recipe(contents: Contents) -> Html:
    if not contents.recipe:
        return Html("")
    rest = "\n…" if len(contents.recipe) > MOST_RECIPE else ""
    return section("Recipe", element("pre", contents.recipe[:MOST_RECIPE].rstrip() + rest, css="quote"))
