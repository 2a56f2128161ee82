"""One file for a bug report."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from lorafit.doctor.examine import Diagnosis
from lorafit.doctor.scrub import scrubbed
from lorafit.errors import RunDirError
from lorafit.recipe.recipe_yaml import write_asked_for
from lorafit.storage.run_dir import RunDir

MOST_BYTES = 5_000_000
"""Of one file: of a longer one the end, which is where it went wrong."""


def write_bundle(diagnosis: Diagnosis, file: Path, *, run: Path | None) -> tuple[str, ...]:
    """The diagnosis and, of a run, its recipe, manifest, metrics and events: no rows, no weights, no secrets.

    The names in the file. Raises RunDirError when `run` is none, RecipeError when `file` cannot be written.
    """
    contents = {"doctor.json": json.dumps(diagnosis.as_dict(), indent=2, ensure_ascii=False)}
    if run is not None:
        if not run.is_dir():
            raise RunDirError("is not a directory; name the output_dir of a run", where=str(run))
        contents |= _of_run(RunDir(run))
    bundle = io.BytesIO()
    with zipfile.ZipFile(bundle, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in contents.items():
            archive.writestr(name, scrubbed(text))
    write_asked_for(file, bundle.getvalue(), option="--bundle", overwrite=False)
    return tuple(contents)


def _of_run(run: RunDir) -> dict[str, str]:
    parts = [file for file in (run.recipe, run.manifest, run.metrics, run.events) if file.is_file()]
    contents = {f"run/{file.name}": _end_of(file) for file in parts}
    listed = [
        f"{path.relative_to(run.path)} {path.stat().st_size}" for path in sorted(run.path.rglob("*")) if path.is_file()
    ]
    return contents | {"run/files.txt": "\n".join(listed) + "\n"}


def _end_of(file: Path) -> str:
    content = file.read_bytes()
    return content[-MOST_BYTES:].decode("utf-8", "replace")
