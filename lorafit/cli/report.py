"""`lorafit report`."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.app import AsJson, Debug, Quiet, app, print_result

logger = logging.getLogger(__name__)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or that of a sweep.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: RUN/report.html. Plots lie beside it.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=0, max=20, help="Rows of each side shown as tokens.")] = 3,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put everything a run left on one page that opens offline, and its plots into files."""
    from lorafit.report.escape_control import inert
    from lorafit.report.page.write_page import write_report

    written = write_report(run, out=out, rows=rows)
    for note in written.notes:
        logger.info(f"note: {inert(note)}")
    print_result(asdict(written), as_json=as_json, text=f"{inert(written.report)}: open it in a browser")
