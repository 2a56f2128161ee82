"""The benchmarks of a GPU, as far as they run without one: they leave it to other processes, and lose nothing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import made_with
import own_process
import plan_vs_gpu
import pytest
import speed_gpu

from support import ROOT


@pytest.mark.parametrize("name", ["plan_vs_gpu", "speed_gpu"])
def test_the_process_that_starts_the_others_leaves_cuda_alone(name: str) -> None:
    """The import of bitsandbytes alone initialises it where there is a GPU."""
    code = f"""
import sys, torch
touched = []
torch.cuda._lazy_init = lambda: touched.append("cuda")
import {name}
print(touched, "bitsandbytes" in sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(plan_vs_gpu.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "[] False\n"


def test_each_case_is_predicted_and_measured_by_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answers(command: list[str], *, environment: dict[str, str], seconds: float) -> str:
        asked.append(json.loads(command[-1])["what"])
        if environment:
            assert environment == {"CUDA_VISIBLE_DEVICES": ""}
            return json.dumps({"allocated": 98, "reserved": 110, "seconds": 1.1})
        return json.dumps({"allocated": 100, "reserved": 120, "seconds": 1.0})

    monkeypatch.setattr(plan_vs_gpu, "output_of", answers)
    gpu = {"memory_bytes": 1000}
    (row,) = plan_vs_gpu.rows(plan_vs_gpu.CASES[:1], shape="llama3-8b", gpu=gpu, budget=60)
    assert asked == ["predicted", "measured"]
    assert row["memory_off"] == pytest.approx(-0.02)
    assert row["time_off"] == pytest.approx(0.1)
    assert "-2.00%" in plan_vs_gpu.line(row)
    assert plan_vs_gpu.verdict([row]) == 0


def test_a_case_that_fails_is_said_and_breaks_the_claim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(command: list[str], *, environment: dict[str, str], seconds: float) -> str:
        if environment:
            return json.dumps({"allocated": 1, "reserved": 2, "seconds": None})
        raise own_process.NoAnswer("torch.OutOfMemoryError: CUDA out of memory")

    monkeypatch.setattr(plan_vs_gpu, "output_of", fails)
    found = list(plan_vs_gpu.rows(plan_vs_gpu.CASES[:2], shape="tiny", gpu=None, budget=60))
    assert len(found) == 2
    assert "measured torch.OutOfMemoryError" in plan_vs_gpu.line(found[0])
    assert plan_vs_gpu.verdict(found) == 1


def test_a_case_that_the_end_of_the_time_cuts_off_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[float] = []

    def answers(command: list[str], *, environment: dict[str, str], seconds: float) -> str:
        left.append(seconds)
        if len(left) == 4:
            time.sleep(seconds)
            raise own_process.NoAnswer("killed: it took more than 1 s")
        return json.dumps({"allocated": 100, "reserved": 120, "seconds": 1.0})

    monkeypatch.setattr(plan_vs_gpu, "output_of", answers)
    found = list(plan_vs_gpu.rows(plan_vs_gpu.CASES, shape="tiny", gpu=None, budget=0.5))
    assert [row["case"] for row in found] == [str(plan_vs_gpu.CASES[0])]
    assert max(left) <= 0.5 and len(left) == 4
    assert capsys.readouterr().out == "the time is over\n"
    assert plan_vs_gpu.verdict(found) == 0


def test_a_process_that_takes_too_long_is_killed_with_what_it_started(tmp_path: Path) -> None:
    started, mark = time.monotonic(), tmp_path / "mark"
    with pytest.raises(own_process.NoAnswer, match="killed"):
        own_process.output_of(["sh", "-c", f"(sleep 4; touch {mark}) & wait"], environment={}, seconds=0.3)
    assert time.monotonic() - started < 3
    time.sleep(max(0.0, started + 5 - time.monotonic()))
    assert not mark.exists()


def test_the_last_line_of_an_error_is_what_is_said_of_it() -> None:
    with pytest.raises(own_process.NoAnswer, match=r"^too little$"):
        own_process.output_of(["sh", "-c", "echo first >&2; echo too little >&2; exit 3"], environment={}, seconds=9)
    assert own_process.output_of(["sh", "-c", "echo $WORD"], environment={"WORD": "so"}, seconds=9) == "so\n"


def test_what_was_measured_stays_when_the_benchmark_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measures(work: Path, *, side: str, chosen: argparse.Namespace, seconds: float) -> dict[str, Any]:
        if side == "prepare":
            return {"device": "H9", "bf16_tflops": 1000, "operations": dict.fromkeys(speed_gpu.SIDES, 10**9)}
        if side == "lorafit-qlora":
            raise KeyboardInterrupt
        speed = {"lorafit": 500_000.0, "trl-packed": 250_000.0}[side]
        return {"tokens_per_second": speed, "peak_memory_bytes": 2**30, "losses": [1.0]}

    out = tmp_path / "speed.json"
    monkeypatch.setattr(speed_gpu, "in_its_own_process", measures)
    monkeypatch.setattr(sys, "argv", ["speed_gpu.py", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        speed_gpu.main()
    assert "0.50 of lorafit" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert {side: found["mfu"] for side, found in report["sides"].items()} == {"lorafit": 0.5, "trl-packed": 0.25}
    assert report["device"] == "H9" and report["versions"]["lorafit"]


def test_no_side_is_begun_once_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def measures(work: Path, *, side: str, chosen: argparse.Namespace, seconds: float) -> dict[str, Any]:
        asked.append(side)
        if side == "prepare":
            return {"device": "H9", "bf16_tflops": None, "operations": dict.fromkeys(speed_gpu.SIDES, 1)}
        time.sleep(0.3)
        return {"error": "killed: it took more than 0 s"}

    monkeypatch.setattr(speed_gpu, "in_its_own_process", measures)
    monkeypatch.setattr(sys, "argv", ["speed_gpu.py", "--budget", "0.2"])
    assert speed_gpu.main() == 1
    assert asked == ["prepare", "lorafit"]
    assert capsys.readouterr().out.endswith("the time is over\n")


def test_a_package_that_is_on_the_path_alone_has_no_version_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(made_with, "version", version)
    made = made_with.made_with("python x.py", device="H9")
    assert made["versions"]["torch"] is None and made["versions"]["lorafit"]


PARTS = ["env", "kernels", "lora", "qlora", "tests", "suite", "speed", "plan"]


@pytest.mark.parametrize(
    ("end", "total", "code", "how"), [(0, 99, 0, "ok"), (3, 99, 1, "failed 3"), (0, 0, 1, "no time")]
)
def test_the_gpu_check_does_every_part_and_sums_up(tmp_path: Path, end: int, total: int, code: int, how: str) -> None:
    script = ROOT / "scripts/gpu_check.sh"
    python = tmp_path / "python"  # which has all libraries, and ends with `end`
    python.write_text(f"#!/bin/sh\n[ $1 = -c ] || exit {end}\n")
    python.chmod(0o755)
    chosen = {"PYTHON": str(python), "TOTAL": str(total), "OUT": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", str(script)], env=chosen, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (code, "")
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert sorted(line.removeprefix(how).split()[0] for line in lines) == sorted(PARTS)
    assert sorted(done.stdout.splitlines()) == sorted(lines)
