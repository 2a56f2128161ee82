"""Every result in benchmarks/results as one page, benchmarks/results/README.md.

    python scripts/results_tables.py                                        # write the page
    python scripts/results_tables.py --record merge_1gb benchmarks/merge.py --size 1GB

With `--record NAME SCRIPT ...` the script runs first, and what it prints is kept as NAME.json. A result is a JSON file
that says what it was made with (command, date, device, threads, versions) and holds either `printed`, or figures of its
own: of these each list or mapping of rows becomes a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorafit.preflight import this_machine

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
PAGE = "README.md"
MADE_WITH = ("command", "date", "device", "threads", "versions", "exit_code")
PACKAGES = ("lorafit", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
OPENING = """\
# Results

Written by `python scripts/results_tables.py` from the JSON files beside it. Each says where it was made, and by which
command it is made anew; times depend on the machine, and on what else it does.
"""


def page(results: Path) -> str:
    """The Markdown of every result in the directory, by name."""
    files = sorted(results.glob("*.json"))
    return "\n".join([OPENING, *(_section(file.stem, json.loads(file.read_text("utf-8"))) for file in files)])


def _section(name: str, result: dict[str, Any]) -> str:
    blocks = [f"## {name.replace('_', ' ')}", " · ".join(_made_with(result))]
    if "printed" in result:
        blocks.append("```text\n" + "\n".join(result["printed"]) + "\n```")
    for key, figures in result.items():
        if key not in (*MADE_WITH, "printed"):
            blocks.append(_figures(key.replace("_", " "), figures))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _made_with(result: dict[str, Any]) -> Iterator[str]:
    if "command" in result:
        yield f"`{result['command']}`"
    for key in ("date", "device"):
        if key in result:
            yield str(result[key])
    if "threads" in result:
        yield f"{result['threads']} thread{'s' if result['threads'] != 1 else ''}"
    if result.get("versions"):
        yield ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    if result.get("exit_code"):
        yield f"**ended with exit code {result['exit_code']}**"


def _figures(name: str, figures: Any) -> str:
    """A table of the rows, or one line of a single figure."""
    if isinstance(figures, dict):
        rows = [{name: key} | (_flat(row) if isinstance(row, dict) else {"": row}) for key, row in figures.items()]
    elif isinstance(figures, list) and all(isinstance(row, dict) for row in figures):
        rows = [_flat(row) for row in figures]
    else:
        return f"{name}: {_cell(figures)}"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Mappings in the row as columns of their own."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = str(key).replace("_", " ")
        flat |= (
            {f"{name} {inner}": one for inner, one in _flat(value).items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return " – ".join(_cell(one) for one in value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def record(name: str, command: list[str], *, results: Path) -> None:
    """Run a script of this repository and keep what it prints, whatever it ends with; its stderr goes on to ours."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=False)
    result = {
        "command": shlex.join(["python", *command]),
        "date": date.today().isoformat(),
        "device": this_machine().name,
        "threads": int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))),
        "versions": {package: version(package) for package in PACKAGES},
        "exit_code": done.returncode,
        "printed": done.stdout.rstrip().splitlines(),
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Record, where that is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="another directory of results")
    parser.add_argument("--record", metavar="NAME", help="run SCRIPT and keep what it prints")
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT ...")
    chosen = parser.parse_args()
    if bool(chosen.record) != bool(chosen.script):
        parser.error("--record NAME goes with a SCRIPT to run")
    if chosen.record:
        record(chosen.record, chosen.script, results=chosen.results)
    (chosen.results / PAGE).write_text(page(chosen.results), encoding="utf-8")


if __name__ == "__main__":
    main()
