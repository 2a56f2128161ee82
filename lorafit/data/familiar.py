"""What `lorafit init` makes of a data file whose columns have names of their own."""

from typing import Any

from lorafit.data.files import FileProblem, files_of, read_bytes, unpack
from lorafit.data.formats import fitting_formats
from lorafit.data.readers import read_rows

_PROMPTS = ("prompt", "question", "instruction", "input", "query", "problem")
_COMPLETIONS = ("completion", "answer", "output", "response", "solution", "target")


def familiar_mapping(path: str) -> dict[str, Any]:
    """`format` and `columns` for a file that fits no format but whose first row has names that many data sets use.

    Empty where the columns fit as they are, where there is nothing familiar, and where the file cannot be read:
    `validate` says then what is wrong.
    """
    first = first_row(path)
    if first is None or fitting_formats(first.keys(), {}):
        return {}
    prompt = next((name for name in _PROMPTS if name in first), None)
    completion = next((name for name in _COMPLETIONS if name in first), None)
    if prompt is None or completion is None:
        return {}
    return {"format": "prompt_completion", "columns": {"prompt": prompt, "completion": completion}}


def first_row(path: str) -> dict[str, Any] | None:
    """The first row of a data file; None where it is no object, and where the file cannot be read."""
    try:
        files, _ = files_of(path)
        rows = read_rows(files[0], unpack(files[0], read_bytes(files[0])), broken=lambda _line, _message: None)
        _, first = next(iter(rows), (0, None))
    except (FileProblem, UnicodeError):
        return None
    return first if isinstance(first, dict) else None
