"""Names on the disk are given, flushed, hashed and locked in lorafit/storage alone; here is who may, and why."""

from __future__ import annotations

import ast

import pytest

from support import ROOT

PACKAGE = ROOT / "lorafit"
MAY = {
    ("merging/write_weights.py", "flush"): "has the disk work on weights while the next are computed",
    ("operating_system.py", "flush"): "what systems do differently stands there",
    ("operating_system.py", "lock"): "a drive is flushed by fcntl",
    ("training/disk.py", "flush"): "tries whether a disk takes a megabyte",
}
"""What a file does itself, and why."""


def own_ways(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and kind of each place that does by hand what storage is for."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names]
            if "fcntl" in (module, *names):
                found.append((node.lineno, "lock"))
            if module == "lorafit.operating_system" and "flush" in names:
                found.append((node.lineno, "flush"))
            if module in ("os", "tempfile") or (module == "hashlib" and "file_digest" in names):
                found.append((node.lineno, f"hidden by `from {module}`"))
        if isinstance(node, ast.Attribute) and (kind := _kind(node)):
            found.append((node.lineno, kind))
        if isinstance(node, ast.Call) and _hashes_file(node):
            found.append((node.lineno, "hash"))
        if isinstance(node, ast.Call) and _renames(node):
            found.append((node.lineno, "rename"))
    return found


def _kind(node: ast.Attribute) -> str | None:
    owner = node.value.id if isinstance(node.value, ast.Name) else ""
    kinds = {
        ("os", "rename"): "rename",
        ("os", "replace"): "rename",
        ("os", "renames"): "rename",
        ("shutil", "move"): "rename",
        ("os", "fsync"): "flush",
        ("os", "fdatasync"): "flush",
        ("os", "link"): "rename",
        ("operating_system", "flush"): "flush",
        ("tempfile", "TemporaryDirectory"): "scratch",
        ("tempfile", "NamedTemporaryFile"): "scratch",
        ("tempfile", "mkdtemp"): "scratch",
        ("tempfile", "mkstemp"): "scratch",
        ("hashlib", "file_digest"): "hash",
    }
    return kinds.get((owner, node.attr))


def _renames(call: ast.Call) -> bool:
    """`path.rename(target)` and `path.replace(target)`; of a string `replace` takes two."""
    is_method = isinstance(call.func, ast.Attribute) and call.func.attr in ("rename", "replace")
    return is_method and len(call.args) == 1 and not call.keywords


def _hashes_file(call: ast.Call) -> bool:
    """`sha256(path.read_bytes())`: all of a file in memory."""
    if not (isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)):
        return False
    inner = [node for argument in call.args for node in ast.walk(argument)]
    reads = [node for node in inner if isinstance(node, ast.Attribute) and node.attr in ("read_bytes", "read")]
    return call.func.value.id == "hashlib" and bool(reads)


def test_nothing_but_storage_renames_flushes_hashes_or_locks_files_or_makes_temporary_ones() -> None:
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "storage")
    assert len(files) > 200
    found = {
        f"{name}:{line}: {kind}"
        for path in files
        for line, kind in own_ways(ast.parse(path.read_text(encoding="utf-8")))
        if (name := path.relative_to(PACKAGE).as_posix(), kind) not in MAY
    }
    assert found == set()


def test_storage_knows_nothing_of_the_rest_but_its_errors() -> None:
    rooms = set()
    files = sorted((PACKAGE / "storage").glob("*.py"))
    assert len(files) > 6
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorafit"):
                rooms.add((node.module or "").split(".")[1:2][0] if node.module != "lorafit" else node.names[0].name)
    assert rooms <= {"storage", "errors", "operating_system"}


@pytest.mark.parametrize(
    "line",
    [
        "import os\nos.replace(a, b)",
        "from os import replace",
        "path.rename(target)",
        "path.replace(target)",
        "import fcntl",
        "import os\nos.fsync(1)",
        "import tempfile\ntempfile.mkdtemp()",
        "import hashlib\nhashlib.sha256(path.read_bytes())",
        "import hashlib\nhashlib.file_digest(file, 'sha256')",
    ],
)
def test_each_way_of_its_own_is_noticed(line: str) -> None:
    assert own_ways(ast.parse(line))


def test_what_looks_alike_is_left_alone() -> None:
    text = "text.replace('a', 'b')\nreplace(recipe, path=1)\nhashlib.sha256(text.encode())\ntempfile.TemporaryFile()"
    assert own_ways(ast.parse(text)) == []
