"""Memory that runs out in one of two processes holds up neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support import ROOT, SUPPORT

pytestmark = pytest.mark.xdist_group(
    "training out_of_memory_of_two"
)  # its fixtures cost too much to be made by each worker


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, dict[str, Any]]:
    """The directory of the runs, and the exit code and output of each process of each run."""
    directory = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SUPPORT / "memory_of_two.py"), str(directory), str(tiny_base)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "WANDB_MODE": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "reference"),
    [("forward", "alone"), ("backward", "alone"), ("packed", "packed alone")],
)
def test_all_processes_halve_and_come_to_the_same(
    name: str, reference: str, cases: tuple[Path, dict[str, Any]]
) -> None:
    directory, ended = cases
    assert [code for code, _ in ended[name]] == [0, 0], ended[name]
    one, two = (load_file(directory / run / "run/adapter/adapter_model.safetensors") for run in (reference, name))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-4, msg=key)
    said = [text.count("done again, and from here on, with ") for _, text in ended[name]]
    assert said == [1, 0]


def test_without_halving_the_one_says_so_and_both_end(cases: tuple[Path, dict[str, Any]]) -> None:
    directory, ended = cases
    (first, said), (second, _) = ended["stop"]
    assert first == 4
    assert said.count("out of memory while training: 2.50 GiB was asked for") == 1
    assert second != 0
    assert not (directory / "stop/run/adapter").exists()
