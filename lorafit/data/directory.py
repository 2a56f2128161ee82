"""What of a directory is data: not what describes it, and never another split than the one that is meant."""

from __future__ import annotations

import json
import os
import re
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

from lorafit.data.source_files import KNOWN, DataFile, FileProblem, data_file, suffix_of

DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files beside the rows that look like them."""
HELD_OUT = frozenset(("test", "tests", "testing", "valid", "validation", "val", "dev", "eval", "evaluation", "holdout"))
VALIDATION = frozenset(("valid", "validation", "val", "dev"))
TRAINING = frozenset(("train", "training"))
_SHARD = re.compile(r"-\d+(-of-\d+)?$")


def files_in(directory: Path) -> tuple[list[DataFile], list[DataFile]]:
    """The data files of a directory and of those in it, sorted, and the files that are left out.

    Raises FileProblem when there is none.
    """
    if not os.access(directory, os.R_OK | os.X_OK):
        raise FileProblem("cannot be read (Permission denied); check its permissions")
    if (directory / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(entry.name for entry in directory.iterdir() if (entry / "state.json").is_file()))
        raise FileProblem(f"holds several splits, written by `save_to_disk` ({splits}); write path: DIRECTORY/SPLIT")
    if (saved := _saved_by_datasets(directory)) is not None:
        return [data_file(file) for file in saved], []
    found = sorted(file for file in directory.rglob("*") if file.is_file() and not _is_hidden(file, directory))
    data = [file for file in found if suffix_of(file.name) not in ("", ".arrow") and file.name not in DESCRIPTIONS]
    if not data:
        raise FileProblem(f"is a directory without data files ({KNOWN}, each also .gz)")
    return [data_file(file) for file in data], [data_file(file) for file in found if file not in set(data)]


def _saved_by_datasets(directory: Path) -> list[Path] | None:
    """The Arrow files that `Dataset.save_to_disk` wrote; None for other directories."""
    state = directory / "state.json"
    if not state.is_file() or not (directory / "dataset_info.json").is_file():
        return None
    try:
        return [directory / file["filename"] for file in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileProblem("was not written whole by `save_to_disk` (state.json); write it again") from None


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(root).parts)


def refuse_other_splits(files: list[DataFile], root: str, *, is_for_training: bool) -> None:
    """Raises FileProblem when files of a directory, which is named `root`, are named as rows for the other side."""
    others = HELD_OUT if is_for_training else TRAINING
    names = [file.name.removeprefix(root).lstrip("/") for file in files]
    foreign = [name for name in names if not others.isdisjoint(_words(name))]
    if not foreign:
        return
    kept = [name for name in names if name not in foreign]
    shown = f"{', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}"
    what = "held-out rows" if is_for_training else "training rows"
    mend = f"name the others with a glob, e.g. path: {_glob(kept, names, root)}" if kept else "name them by a glob"
    raise FileProblem(f"holds {what} ({shown}); {mend}, or these as well if they are meant")


def splits_of(directory: str) -> tuple[str, str] | None:
    """What to name for the training rows of a directory and for its held-out ones; None where its files do not say.

    Of held-out files those for validation are taken, where there are any: the others are for the very end.
    """
    try:
        files, _ = files_in(Path(directory))
    except FileProblem:
        return None
    names = [file.path.relative_to(directory).as_posix() for file in files]
    held_out = [name for name in names if not HELD_OUT.isdisjoint(_words(name))]
    kept = [name for name in names if name not in held_out]
    if not held_out or not kept:
        return None
    meant = [name for name in held_out if not VALIDATION.isdisjoint(_words(name))] or held_out
    root = directory.rstrip("/")
    return _glob(kept, names, root), _glob(meant, names, root)


def _words(name: str) -> set[str]:
    """What says the split: the names of directories, and the first and last word of the file's."""
    *directories, file = name.lower().removesuffix(".gz").split("/")
    stem = _SHARD.sub("", file.rpartition(".")[0])
    words = re.split(r"[^a-z]+", stem)
    return {*directories, words[0], words[-1]}


def _glob(kept: list[str], names: list[str], root: str) -> str:
    """A pattern for the files that are kept and none of the others; the first of them where there is no simple one."""
    if len(kept) > 1:
        start, end = _shared(kept), _shared([name[::-1] for name in kept])[::-1]
        pattern = f"{start}*{end}" if len(start) + len(end) <= min(map(len, kept)) else f"{start}*"
        is_flat = all("/" not in name.removeprefix(start) for name in kept)
        if is_flat and [name for name in names if fnmatchcase(name, pattern)] == kept:
            return f"{root}/{pattern}"
    return f"{root}/{kept[0]}"


def _shared(names: list[str]) -> str:
    """The characters that all begin with."""
    same = takewhile(lambda characters: len(set(characters)) == 1, zip(*names, strict=False))
    return "".join(characters[0] for characters in same)
