"""Which room may import from which: down the house, but for the few arrows named here with their reason."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import lorafit

ROOT = Path(lorafit.__file__).parent
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "imports", "operating_system", "lines"),
    ("storage",),
    ("recipe", "pulse", "precision", "packages"),
    ("launching",),
    ("preflight", "doctor"),
    ("builders",),
    ("data", "speed"),
    ("base_at_hand", "validation"),
    ("training",),
    ("merging",),
    ("evaluation", "planning"),
    ("sweep",),
    ("report",),
    ("cli", "api"),
)
"""From the ground up: a room imports from its own floor and from those below. `tasks` has its names on the floor of the
recipe and its pages on that of training (tests/tasks/test_tasks.py)."""
UPWARD = {
    ("training", "planning"): "a run is planned before it starts, and the empty base is the planner's",
}


def room_of(file: Path) -> str:
    parts = file.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else file.stem


def modules() -> dict[str, Path]:
    found = {}
    for file in ROOT.rglob("*.py"):
        name = ".".join(("lorafit", *file.relative_to(ROOT).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = file
    return found


def imported_by(file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports at once: not those for types, nor those in functions."""
    found = set()

    def look(statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
                look(statement.orelse)
            elif isinstance(statement, ast.ImportFrom) and statement.module:
                for name in (f"{statement.module}.{alias.name}" for alias in statement.names):
                    found.add(name if name in known else statement.module)
            elif isinstance(statement, ast.Import):
                found.update(alias.name for alias in statement.names)

    look(ast.parse(file.read_text(encoding="utf-8")).body)
    return found & known.keys()


def arrows() -> dict[tuple[str, str], list[str]]:
    """From room to room: the files that draw the arrow, also for types and in functions."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorafit."):
                arrow = (room_of(file), str(node.module).split(".")[1])
                if arrow[0] != arrow[1]:
                    found[arrow].append(str(file.relative_to(ROOT)))
    return found


def test_every_arrow_between_rooms_points_down() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    free = {"__init__", "__main__", "tasks"}
    drawn = {arrow: files for arrow, files in arrows().items() if not free & set(arrow)}
    assert {room for arrow in drawn for room in arrow} <= floor.keys(), "a room without a floor"
    upward = {arrow: files for arrow, files in drawn.items() if floor[arrow[0]] < floor[arrow[1]]}
    assert upward.keys() == UPWARD.keys(), upward


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = modules()
    imports = {name: imported_by(file, known) for name, file in known.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(imports[name] - {name}):
                visit(other, (*above, name))
            done.add(name)

    for name in known:
        visit(name, ())
