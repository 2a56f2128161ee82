"""`lorafit doctor` names what is broken and what mends it: each line is seen to turn when its cause does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from lorafit.cli import _exit_code
from lorafit.doctor import machine, surroundings
from lorafit.doctor.bundle import write_bundle
from lorafit.doctor.diagnosis import Line
from lorafit.doctor.examine import Diagnosis, cache_mend, examine
from lorafit.doctor.probe_answers import Answers, answers, probe
from lorafit.doctor.scrub import scrubbed
from lorafit.errors import RecipeError, RunDirError
from lorafit.report.doctor import doctor_text
from support import ROOT

TORCH = """
import time, types
__version__ = "2.13.0"
version = types.SimpleNamespace(cuda={cuda!r}, hip=None)
class Matrix:
    def __matmul__(self, other): return self
    def __sub__(self, other): return self
    def sum(self): return {product}
    def abs(self): return self
    def max(self): return {off}
def ones(*shape, device): return Matrix()
def get_num_threads(): return 1
class cuda:
    is_available = staticmethod(lambda: {available})
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(lambda index: types.SimpleNamespace(name="H9", total_memory=80 << 30))
    is_bf16_supported = staticmethod(lambda including_emulation: True)
    @staticmethod
    def init(): {init}
class cpu:
    _is_avx512_bf16_supported = staticmethod(lambda: {bf16})
    _is_amx_tile_supported = staticmethod(lambda: False)
backends = types.SimpleNamespace(
    cpu=types.SimpleNamespace(get_cpu_capability=lambda: "AVX512"),
    mkldnn=types.SimpleNamespace(is_available=lambda: True),
)
ops = types.SimpleNamespace(mkldnn=types.SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True))
"""
BITSANDBYTES = """
def quantize_4bit(ones, quant_type): return ones, None
def dequantize_4bit(packed, state): return packed
"""
NO_DRIVER = machine.Driver()
SETTINGS = {"cuda": None, "product": 64.0**3, "off": 0.0, "available": False, "init": "pass", "bf16": True}


def stub_libraries(directory: Path, *, torch: str = "", bitsandbytes: str = BITSANDBYTES, **settings: object) -> Path:
    """A torch and a bitsandbytes of a few lines, which answer as the settings say."""
    (directory / "bitsandbytes").mkdir(parents=True)
    (directory / "torch.py").write_text(torch or TORCH.format(**(SETTINGS | settings)), encoding="utf-8")
    (directory / "bitsandbytes/__init__.py").write_text("", encoding="utf-8")
    (directory / "bitsandbytes/functional.py").write_text(bitsandbytes, encoding="utf-8")
    return directory


def asked(directory: Path, monkeypatch: pytest.MonkeyPatch, *, seconds: float = 30, **stubs: object) -> Answers:
    """What the probe says where these libraries are installed."""
    monkeypatch.setenv("PYTHONPATH", str(stub_libraries(directory / "site", **stubs)))  # type: ignore[arg-type]
    return answers(probe("torch"), seconds=seconds)


def device_lines(found: Answers, driver: machine.Driver = NO_DRIVER) -> dict[str, Line]:
    return {line.name: line for line in machine.device_lines(found, driver)}


def fake_smi(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> machine.Driver:
    """What is made of an nvidia-smi that does this."""
    program = directory / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return machine.nvidia_driver()


def test_an_old_python_is_named() -> None:
    assert "3.10.4; lorafit needs 3.11" in machine.python_line((3, 10, 4)).found
    assert machine.python_line((3, 10, 4)).is_broken and not machine.python_line().mend


def installed_as(directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: str) -> dict[str, Line]:
    """The library lines where another version of a library is found first."""
    about = directory / f"{name}-{number}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(directory))
    return {line.name: line for line in machine.library_lines()}


def test_the_libraries_of_the_tested_set_are_one_line() -> None:
    (line,) = machine.library_lines()
    assert line.name == "libraries" and not line.mend and f"peft {version('peft')}" in line.found


def test_a_library_outside_its_range_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = installed_as(tmp_path, monkeypatch, "peft", "0.17.0")["peft"]
    assert line.is_broken and line.found.startswith("0.17.0; ")
    assert line.mend.startswith("pip install 'peft<0.22,>=0.21")


def test_a_version_that_was_not_tested_is_said_and_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = installed_as(tmp_path, monkeypatch, "accelerate", "1.14.9")["accelerate"]
    assert line.found == "1.14.9 (tested with 1.13.0 and 1.15.0)" and not line.mend


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "requires", lambda name: ["no-such-library<2,>=1", "gone>=1; extra == 'test'"])
    missing, rest = machine.library_lines()
    assert missing.mend == "pip install 'no-such-library<2,>=1'" and rest.name == "libraries"


def test_a_checkout_that_is_only_on_the_path_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "requires", requires)
    assert {"torch", "peft", "attrs"} < {Requirement(text).name for text in machine.own_requirements()}
    monkeypatch.setattr(machine, "PROJECT", Path("nowhere/pyproject.toml"))
    assert machine.own_requirements() == []


def test_the_tested_sets_are_those_of_the_repository() -> None:
    assert machine.CONSTRAINTS.resolve() == ROOT / "constraints.txt"
    assert machine.OLDEST_CONSTRAINTS.resolve() == ROOT / "constraints-oldest.txt"
    assert version("torch").partition("+")[0] in machine.tested_versions()["torch"]


def test_a_machine_without_a_gpu_trains_on_its_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = device_lines(asked(tmp_path, monkeypatch))
    assert [name for name, line in lines.items() if line.mend] == []
    assert "CPU cores" in lines["gpu"].found and lines["bf16"].found == "computed natively"


def test_missing_bfloat16_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = device_lines(asked(tmp_path, monkeypatch, bf16=False))["bf16"]
    assert "not native" in line.found and not line.mend


def test_a_gpu_that_computes_is_shown_with_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = fake_smi(tmp_path, monkeypatch, "echo '570.1, H9'")
    lines = device_lines(asked(tmp_path, monkeypatch, cuda="13.0", available=True), driver)
    assert lines["gpu"].found == "H9 (80 GiB)" and lines["driver"].found == "NVIDIA 570.1"
    assert lines["bitsandbytes"].found == "4 bits and back on cuda"
    assert not any(line.mend for line in lines.values())


def test_a_gpu_that_computes_wrongly_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = device_lines(asked(tmp_path, monkeypatch, cuda="13.0", available=True, product=7.0))["gpu"]
    assert line.found == "H9 computes wrongly" and line.is_broken


def test_a_torch_for_cpu_beside_a_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = device_lines(asked(tmp_path, monkeypatch), machine.Driver(("H9",), "570.1"))["gpu"]
    assert "built for CPU" in line.found and line.mend.startswith("pip install") and line.is_broken


def test_a_driver_too_old_for_torch_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = asked(tmp_path, monkeypatch, cuda="13.0", init="raise RuntimeError('the driver is too old')")
    line = device_lines(found, machine.Driver(("H9",), "400.1"))["gpu"]
    assert "the driver is too old" in line.found and "newer NVIDIA driver" in line.mend and line.is_broken


def test_a_hidden_gpu_is_said_and_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    line = device_lines(asked(tmp_path, monkeypatch, cuda="13.0"), machine.Driver(("H9",), "570.1"))["gpu"]
    assert line.mend == "unset CUDA_VISIBLE_DEVICES" and not line.is_broken


def test_a_driver_that_hangs_is_named_and_does_not_hang_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = TORCH.format(**SETTINGS).replace("lambda: False)\n    device", "lambda: time.sleep(60))\n    device")
    lines = device_lines(asked(tmp_path, monkeypatch, torch=hanging, seconds=6))
    assert "gave no answer in 6 s" in lines["gpu"].found and "the driver hangs" in lines["gpu"].mend
    assert not lines["torch"].mend and lines["bitsandbytes"].is_broken


def test_a_torch_that_does_not_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = device_lines(asked(tmp_path, monkeypatch, torch="raise ImportError('libcudart.so.13: not found')"))["torch"]
    assert line.found == "ImportError: libcudart.so.13: not found" and line.mend.startswith("pip install")


def test_a_library_that_crashes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
    lines = device_lines(asked(tmp_path, monkeypatch, bitsandbytes=crash))
    assert lines["bitsandbytes"].found == "was ended by signal 11" and not lines["torch"].mend


@pytest.mark.parametrize("stub", [{"off": 0.5}, {"bitsandbytes": "raise RuntimeError('no kernel')"}])
def test_four_bits_that_do_not_come_back_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: dict[str, Any]
) -> None:
    line = device_lines(asked(tmp_path, monkeypatch, **stub))["bitsandbytes"]
    assert line.is_broken and "bitsandbytes" in line.mend


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "version mismatch"),
        ("exit 9", "exit code 9"),
        ("exec sleep 60", "the driver hangs"),
    ],
)
def test_a_driver_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, problem: str
) -> None:
    monkeypatch.setattr(machine, "SMI_SECONDS", 1)
    driver = fake_smi(tmp_path, monkeypatch, script)
    assert problem in driver.problem and driver.is_there
    line = device_lines(Answers({"torch_import": TORCH_SAID}, "gpus", "gave no answer in 3 s"), driver)["driver"]
    assert line.mend.startswith("reboot") and line.is_broken


TORCH_SAID = {"version": "2.13.0", "cuda": "13.0", "hip": None, "seconds": 1.0}


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = machine.disk_line("disk here", tmp_path / "file/below", mend="choose another")
    assert line.is_broken and line.mend == "choose another" and "cannot be written" in line.found
    assert not machine.disk_line("disk here", tmp_path / "new", mend="choose another", least=1).mend


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    line = machine.disk_line("disk here", tmp_path, mend="free some space", least=1 << 60)
    assert line.mend == "free some space" and "GiB free" in line.found


@contextmanager
def hub(status: int, body: dict[str, str]) -> Iterator[str]:
    """A Hub on this machine that gives every question one answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    ("status", "said", "mend"),
    [(200, "mia, token from HF_TOKEN", ""), (401, "does not accept the token from HF_TOKEN", "hf auth login")],
)
def test_the_login_is_named_and_its_token_is_not(
    monkeypatch: pytest.MonkeyPatch, status: int, said: str, mend: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub(status, {"name": "mia"}) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        line = surroundings.login_line("HF_TOKEN", answers(probe("hub"), seconds=30))
    assert said in line.found and line.mend == mend and TOKEN not in line.found


def test_a_hub_that_cannot_be_reached_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    line = surroundings.login_line("HF_TOKEN", answers(probe("hub"), seconds=30))
    assert "cannot be reached" in line.found and not line.mend


def test_where_the_token_comes_from_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(surroundings, "get_token", lambda: None)
    assert surroundings.token_source({}) == ""
    assert "none" in surroundings.login_line("", None).found
    monkeypatch.setattr(surroundings, "get_token", lambda: TOKEN)
    assert surroundings.token_source({"HF_TOKEN": TOKEN}) == "HF_TOKEN"
    assert surroundings.token_source({}).endswith("token")
    assert "HF_HUB_OFFLINE" in surroundings.login_line("HF_TOKEN", None).found


@pytest.mark.parametrize(
    ("environment", "mend"),
    [
        ({}, ""),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "unset RANK WORLD_SIZE"),
        ({"ACCELERATE_USE_FSDP": "true"}, "unset ACCELERATE_USE_FSDP"),
    ],
)
def test_what_a_launcher_left_in_the_shell_is_named(environment: dict[str, str], mend: str) -> None:
    (line,) = surroundings.accelerate_lines(environment)
    assert line.mend == mend


def test_launch_files_that_are_broken_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ddp.yaml").write_text("a: [", encoding="utf-8")
    monkeypatch.setattr(surroundings, "CONFIGS", tmp_path)
    (line,) = surroundings.accelerate_lines({})
    assert line.is_broken and "ddp.yaml" in line.found


def test_a_localhost_that_does_not_answer_is_named() -> None:
    assert not surroundings.port_line().mend
    assert "/etc/hosts" in surroundings.port_line("203.0.113.1").mend


def test_a_secret_or_a_home_leaves_with_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HOME", "/data/people/mia")
    text = scrubbed(
        f"{TOKEN} 0123456789abcdef password: hunter22 /data/people/mia/runs /data/people/mia2 /home/ann/x "
        '{"api_key": "zzz", "num_tokens": 5} pad_token: <pad> https://mia:geheim@host'
    )
    for hidden in (TOKEN, "0123456789abcdef", "hunter22", "people/mia/", "ann", "zzz", "geheim"):
        assert hidden not in text
    for kept in ("~/runs", "/data/people/mia2", "~/x", '"num_tokens": 5', "pad_token: <pad>"):
        assert kept in text


def diagnosis(*lines: Line) -> Diagnosis:
    return Diagnosis(lines or (Line("torch", "2.13.0 at /home/mia/venv"),), {"HF_HOME": "/home/mia/hf"})


def test_the_bundle_holds_the_run_without_rows_weights_secrets_and_homes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    (run / "recipe.yaml").write_text(f"path: /home/mia/rows.jsonl\nextra: {TOKEN}\n", encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    (run / "eval.json").write_text('{"samples": ["private"]}', encoding="utf-8")
    names = write_bundle(diagnosis(), tmp_path / "bug.zip", run=run)
    assert names == ("doctor.json", "run/recipe.yaml", "run/metrics.jsonl", "run/files.txt")
    with zipfile.ZipFile(tmp_path / "bug.zip") as archive:
        assert tuple(archive.namelist()) == names
        text = "".join(archive.read(name).decode() for name in names)
    assert "loss" in text and "adapter_model.safetensors 7" in text
    for hidden in (TOKEN, "mia", "private"):
        assert hidden not in text


def test_a_bundle_is_not_overwritten_and_needs_a_run(tmp_path: Path) -> None:
    (tmp_path / "bug.zip").write_text("mine")
    with pytest.raises(RecipeError, match="never overwritten"):
        write_bundle(diagnosis(), tmp_path / "bug.zip", run=None)
    with pytest.raises(RecipeError, match="cannot be written"):
        write_bundle(diagnosis(), tmp_path / "no/bug.zip", run=None)
    with pytest.raises(RunDirError, match="not a directory"):
        write_bundle(diagnosis(), tmp_path / "new.zip", run=tmp_path / "none")
    assert not (tmp_path / "new.zip").exists()


def test_a_line_that_is_needed_decides() -> None:
    worse = diagnosis(Line("gpu", "hidden", "unset X", is_needed=False), Line("ports", "answer"))
    assert worse.works and "training works here" in doctor_text(worse)
    broken = diagnosis(Line("ports", "closed \x1b[31m", "open them"))
    assert not broken.works and doctor_text(broken).splitlines()[-1].endswith("mended: ports")
    assert "-> open them" in doctor_text(broken) and "\x1b" not in doctor_text(broken)


def test_the_command_ends_with_exit_code_4_where_training_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(stub_libraries(tmp_path / "site", torch="raise ImportError('gone')")))
    bundle = tmp_path / "bug.zip"
    assert _exit_code(["doctor", "--json", "--bundle", str(bundle)]) == 4
    result = json.loads(capsys.readouterr().out)
    assert not result["works"] and bundle.exists()
    assert {line["name"]: line["state"] for line in result["lines"]}["torch"] == "mend"
    assert _exit_code(["doctor", "--run", str(tmp_path)]) == 2


def test_training_works_where_this_test_runs() -> None:
    """With the real libraries, which only the process that is asked imports."""
    asked = "_exit_code(['doctor', '--json']); print('torch' in sys.modules)"
    source = f"import sys; from lorafit.cli import _exit_code; {asked}"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=180)
    result, imported = done.stdout.splitlines()
    lines = {line["name"]: line for line in json.loads(result)["lines"]}
    assert [lines[name]["state"] for name in ("python", "libraries", "torch", "bitsandbytes", "ports")] == ["ok"] * 5
    assert "4 bits and back" in lines["bitsandbytes"]["found"] and imported == "False"


def test_everything_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(stub_libraries(tmp_path / "site")))
    names = [line.name for line in examine().lines]
    assert names == [
        *("python", "libraries", "torch", "gpu", "bf16", "bitsandbytes", "disk here", "hub cache", "hub login"),
        *("accelerate", "ports"),
    ]


def test_a_cache_that_holds_something_is_not_given_up(tmp_path: Path) -> None:
    assert "HF_HOME=DIR" in cache_mend(tmp_path)
    (tmp_path / "hub").mkdir()
    assert "LORAFIT_CACHE=DIR" in cache_mend(tmp_path) and "HF_HOME" not in cache_mend(tmp_path)
