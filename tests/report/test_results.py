"""The page of results is what the script makes of the files beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from results_tables import PAGE, RESULTS, page

from support import ROOT

MADE = {"command": "python benchmarks/x.py", "date": "2026-01-31", "device": "A CPU", "threads": 2}


def test_the_page_is_made_from_the_files_beside_it() -> None:
    shown = (RESULTS / PAGE).read_text(encoding="utf-8")
    assert shown == page(RESULTS)
    assert shown.count("\n## ") == len(list(RESULTS.glob("*.json")))


def test_rows_become_tables_and_all_that_they_were_made_with_is_said(tmp_path: Path) -> None:
    sides = {
        "trl": {"tokens_per_second": 1234.6, "range": [1200.0, 1300.2], "ratio": {"trl": 1.0}},
        "a|b": {"ok": True},
    }
    made = MADE | {"versions": {"torch": "2.13.0"}, "sides": sides, "largest": {"trl": 0.00012}, "rows": 7473}
    (tmp_path / "speed_cpu.json").write_text(json.dumps(made))
    cases = [{"name": "docs", "losses": {"8": 1.25}}, {"name": "code", "missed": None}]
    (tmp_path / "sweep.json").write_text(json.dumps({"versions": {"peft": "0.21.2"}, "cases": cases}))
    assert page(tmp_path).split("\n## ")[1:] == [
        "speed cpu\n\n`python benchmarks/x.py` · 2026-01-31 · A CPU · 2 threads · torch 2.13.0\n\n"
        "| sides | tokens per second | range | ratio trl | ok |\n| --- | --- | --- | --- | --- |\n"
        "| trl | 1,235 | 1,200 – 1,300 | 1 |  |\n| a\\|b |  |  |  | yes |\n\n"
        "| largest |  |\n| --- | --- |\n| trl | 0.00012 |\n\nrows: 7,473\n",
        "sweep\n\npeft 0.21.2\n\n"
        "| name | losses 8 | missed |\n| --- | --- | --- |\n| docs | 1.25 |  |\n| code |  |  |\n",
    ]


def test_a_recorded_script_is_shown_as_it_printed_with_its_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "measure.py"
    script.write_text("import sys\nprint('side   tokens/s')\nprint('trl       1,200\\n')\nsys.exit(int(sys.argv[1]))\n")
    command = [sys.executable, str(ROOT / "scripts/results_tables.py"), "--results", str(tmp_path / "results")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--record", "merge_1gb", str(script), "1"], env=environment, check=True, timeout=60)
    shown = (tmp_path / "results" / PAGE).read_text(encoding="utf-8")
    assert "## merge 1gb\n" in shown
    assert f"`python {script} 1` · " in shown
    assert " · 1 thread · lorafit " in shown
    assert "**ended with exit code 1**" in shown
    assert "```text\nside   tokens/s\ntrl       1,200\n```\n" in shown
    done = subprocess.run([*command, "--record", "x"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "--record NAME goes with a SCRIPT to run" in done.stderr
