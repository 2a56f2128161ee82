"""Imports that go on while rows are read: what goes wrong on either side is said as without them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import pytest

from lorafit.imports import imported_meanwhile, quick_imports
from support.commands import ENVIRONMENT
from support.runs import small_recipe

INTERRUPTED = """
import logging, os, signal, time
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as the command does before it imports any
from lorafit.training import inputs
def prepare(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
inputs.prepare = prepare
"""
ELSEWHERE = """
import sys
sys.modules["peft.optimizers"] = None
"""


def lorafit(*arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where nothing is imported yet; `first` is run before."""
    source = f"{first}\nfrom lorafit.cli import main\nmain()"
    command = [sys.executable, "-c", source, *arguments]
    environment = os.environ | ENVIRONMENT
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_an_error_of_the_data_keeps_its_line_and_exit_code(tmp_path: Path, tiny_base: Path) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": 3}\n')
    done = lorafit("train", str(loaded.path))
    assert done.returncode == 3
    assert f"{tmp_path / 'train.jsonl'}:25: " in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_rows_are_read_ends_the_run_in_one_line(tmp_path: Path, tiny_base: Path) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    done = lorafit("train", str(loaded.path), first=INTERRUPTED)
    assert (done.returncode, done.stderr) == (75, "error: stopped on request; nothing was written\n")
    assert not (tmp_path / "run").exists()


def test_a_library_that_cannot_be_imported_is_said_once(tmp_path: Path, tiny_base: Path) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    done = lorafit("train", str(loaded.path), first=ELSEWHERE)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of peft.optimizers halted")


def test_a_module_is_whole_when_the_block_ends_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(0.3)\nwhole = True\n")
    (tmp_path / "broken_module.py").write_text("raise ImportError('no such kernel')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), imported_meanwhile("slow_module"):
        raise KeyboardInterrupt
    assert sys.modules.pop("slow_module").whole
    with imported_meanwhile("broken_module"):
        pass
    assert threading.active_count() == before
    with pytest.raises(ImportError, match="no such kernel"):
        import_module("broken_module")
    gc.unfreeze()


def test_collections_go_on_after_the_imports_and_pass_over_what_they_made() -> None:
    with pytest.raises(ImportError), quick_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000
    gc.unfreeze()
