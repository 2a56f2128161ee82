"""Build recipes/quickstart/{train,eval}.jsonl from the standard library of the running Python.

    python scripts/build_quickstart_data.py [--out recipes/quickstart]

Each row asks for the first sentence of a function's documentation, given its module and signature. The eval rows come
from modules of which neither the train rows nor the pretraining text hold anything, so the held-out loss is honest.
"""

import argparse
import ast
import inspect
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))
# Tests are not documentation, site-packages is not Python's, the code pages in encodings are tables of numbers, and
# lib-dynload, config-3.11-* and _sysconfigdata*.py belong to one build of Python.
LEFT_OUT_FOLDERS = {
    "__pycache__",
    "encodings",
    "ensurepip",
    "idle_test",
    "lib-dynload",
    "site-packages",
    "test",
    "tests",
}
LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")
HELD_OUT_MODULES = {
    *("calendar", "configparser", "csv", "difflib", "filecmp", "fractions", "gzip", "ipaddress", "netrc", "random"),
    *("sched", "selectors", "shelve", "shutil", "statistics", "textwrap", "wave", "webbrowser", "zipfile"),
}
LONGEST_PROMPT = 240  # characters; a signature beyond this would only pad the batches of a two-minute run
LONGEST_SENTENCE = 160
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)\.(?=\s|$)")

Row = dict[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_files(stdlib: Path = STDLIB) -> list[Path]:
    """Python files of the standard library, in an order that does not depend on the file system."""
    relative = sorted(path.relative_to(stdlib).as_posix() for path in stdlib.rglob("*.py"))
    return [
        stdlib / name
        for name in relative
        if not LEFT_OUT_FOLDERS & set(name.split("/")) and not name.startswith(LEFT_OUT_PREFIXES)
    ]


def module_name(path: Path, stdlib: Path = STDLIB) -> str:
    """Dotted name that `import` knows the file by."""
    parts = path.relative_to(stdlib).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_held_out(module: str) -> bool:
    return module.split(".")[0] in HELD_OUT_MODULES


def first_sentence(docstring: str) -> str | None:
    """First sentence on one line, ending in a full stop; None when the docstring does not open with a clean one."""
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    end = SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.start()] if end else paragraph
    is_clean = (
        re.match(r"[A-Z]", sentence)
        and (sentence[-1].isalnum() or sentence[-1] in "`'\")")
        and len(sentence.split()) >= 3
        and len(sentence) < LONGEST_SENTENCE
        and sentence.isascii()
        and not re.search(r"<\||->|>>>|:: | --|e\.g\.|\.\.\.", sentence)
    )
    return sentence + "." if is_clean else None


def functions_of(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Functions and methods with their qualified names; functions inside functions are nobody's interface."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from functions_of(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, Function):
            yield prefix + node.name, node


def rows_of(module: str, source: str) -> Iterator[Row]:
    for name, function in functions_of(ast.parse(source).body):
        sentence = first_sentence(ast.get_docstring(function) or "")
        prompt = f"Module: {module}\nFunction: {name}({ast.unparse(function.args)})"
        if sentence and prompt.isascii() and len(prompt) <= LONGEST_PROMPT:
            yield {"prompt": prompt, "completion": f"Name: {name}\nSummary: {sentence}"}


def train_and_eval_rows(files: Iterable[Path], stdlib: Path = STDLIB) -> tuple[list[Row], list[Row]]:
    """Rows of both files, each prompt once, and no eval row whose sentence stands outside the held-out modules."""
    train: dict[str, Row] = {}
    held_out: dict[str, Row] = {}
    seen_text = ""
    for path in files:
        module, source = module_name(path, stdlib), path.read_text(encoding="utf-8")
        if not is_held_out(module):
            seen_text += " ".join(source.split()) + "\n"
        rows = held_out if is_held_out(module) else train
        for row in rows_of(module, source):
            rows.setdefault(row["prompt"], row)
    new = [row for row in held_out.values() if row["completion"].split("Summary: ")[1][:-1] not in seen_text]
    return list(train.values()), new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "recipes/quickstart")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), train_and_eval_rows(stdlib_files()), strict=True):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}.jsonl: {len(rows):,} rows, {len(lines):,} bytes")


if __name__ == "__main__":
    main()
