"""The first rows of a run, as JSON on stdout: `python -m lorafit.data.preview_job RUN ROWS`.

A process of its own, because who reports does without torch. The rows are those that were trained on: when the data,
the tokenizer or the template is no longer what the manifest says, it says so instead.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

from lorafit.data.cache import cache_directory
from lorafit.data.preview import prepared_preview
from lorafit.errors import LorafitError
from lorafit.recipe import load
from lorafit.storage.run_dir import RunDir


def main(run: RunDir, rows: int) -> int:
    """0 with the rows on stdout, or 4 with the reason why there are none."""
    transformers_logging.set_verbosity_error()
    try:
        fingerprint, view = prepared_preview(load(run.recipe).recipe, rows=rows, cache_dir=cache_directory())
    except LorafitError as error:
        print(error.problems[0])  # noqa: T201 - its stdout is its result
        return error.exit_code
    trained_on = json.loads(run.manifest.read_text(encoding="utf-8"))["data"]["fingerprint"]
    if fingerprint != trained_on:
        print("the data, the template, the tokenizer or a library is no longer that of the run")  # noqa: T201
        return 4
    print(json.dumps(view.as_dict()))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(RunDir(Path(sys.argv[1])), int(sys.argv[2])))
