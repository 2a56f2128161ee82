"""`lorafit doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.app import AsJson, Debug, app, print_result


@app.command()
def doctor(
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="FILE", help="Write all of it into a zip file for a bug report.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN", help="Add this run's recipe, manifest, metrics and events.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Look at what training needs of this machine: each thing is ok, or the command that mends it is named."""
    from lorafit.doctor.bundle import write_bundle
    from lorafit.doctor.examine import examine
    from lorafit.errors import RecipeError
    from lorafit.report.doctor import doctor_text

    if run is not None and bundle is None:
        raise RecipeError("adds a run to a bundle; name the file with --bundle", where="--run")
    diagnosis = examine()
    written = write_bundle(diagnosis, bundle, run=run) if bundle is not None else ()
    text = doctor_text(diagnosis)
    if bundle is not None:
        text += f"\n{bundle}: {', '.join(written)}; look at it before you send it"
    print_result(diagnosis.as_dict(), as_json=as_json, text=text)
    if not diagnosis.works:
        raise typer.Exit(4)
