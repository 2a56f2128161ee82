"""A few of the disturbances of scripts/crash_test.py, which does them all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from support import ROOT
from support.writers import WRITERS


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_killed_damaged_and_resumed_runs_end_with_the_bytes_of_an_undisturbed_one() -> None:
    chosen = ["--kills", "1", "--deaths", "2", "--damages", "1", "--writers", "1"]
    settings = "all of these,adalora,two processes"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/crash_test.py"), *chosen, "--settings", settings],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["failed"] == []
    # Damages are chosen for two settings, of which one has a file that the other has not.
    assert counted["runs"] == counted["equal"] == 1 + 2 + 2 + len(settings.split(",")) + len(WRITERS)
