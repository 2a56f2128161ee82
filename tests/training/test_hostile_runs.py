"""Files of a run that are not as lorafit wrote them, and terminals that are not as it expects."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.cli import _exit_code
from lorafit.errors import AdapterError, RunDirError
from lorafit.merging import adapter_files
from lorafit.merging.adapter_files import read_adapter
from lorafit.report.page.contents import read_contents
from lorafit.storage.files import read_regular
from lorafit.storage.run_dir import RunDir
from support import ROOT
from support.recipes import SMALLEST, written

WHOLE = b'{"step": 1, "kind": "selftest", "message": "passed"}'
LONG = b'{"step": 2, "kind": "stop", "message": "' + b"A" * 2**20 + b'"}'


@pytest.mark.parametrize(
    "torn",
    [
        *(b'{"step": 2, "ki', b'{"step": 2}', b'{"step": 2, "kind": "\xff"}', b"[1]", b"7", b"[" * 9999),
        pytest.param(LONG, id="long"),
    ],
)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_torn_events_are_set_aside_and_the_others_kept(tmp_path: Path, torn: bytes, end: bytes) -> None:
    run = RunDir(tmp_path)
    run.events.write_bytes(WHOLE + b"\n" + torn + end)
    assert [event["step"] for event in run.events_of("selftest")] == [1]
    assert run.set_torn_events_aside() == 1
    run.add_event("resumed", "goes on", step=3)
    assert [json.loads(line)["kind"] for line in run.events.read_bytes().splitlines()] == ["selftest", "resumed"]
    assert (run.quarantine / "events.jsonl").read_bytes() == torn + b"\n"
    assert run.set_torn_events_aside() == 0


def test_whole_events_stay_byte_for_byte(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.set_torn_events_aside() == 0
    run.events.write_bytes(WHOLE + b"\n")
    assert run.set_torn_events_aside() == 0
    assert run.events.read_bytes() == WHOLE + b"\n" and not run.quarantine.exists()


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a file"):
            read_regular(path)


@pytest.mark.parametrize("name", ["manifest.json", "metrics.jsonl", "events.jsonl", "eval.json", "recipe.yaml"])
def test_a_report_follows_no_link_out_of_the_run_and_waits_for_no_pipe(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    secret = tmp_path / "secret"
    secret.write_text("password: hunter2", encoding="utf-8")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    with pytest.raises(RunDirError, match=f"{name}: is a link out of the run"):
        read_contents(run)
    if name == "recipe.yaml":  # what is no file there is no recipe
        return
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(RunDirError, match=f"{name}: cannot be read"):
        read_contents(run)


def test_a_run_that_is_itself_a_link_is_reported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    (tmp_path / "latest").symlink_to(run)
    assert read_contents(tmp_path / "latest").metrics


def test_a_result_steers_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a\u202eb\x1b[31m.yaml"
    assert _exit_code(["init", "--output", str(output)]) == 0
    assert "a\\u202eb\\x1b[31m.yaml" in capsys.readouterr().out


def lorafit(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "lorafit", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, env=os.environ | environment, timeout=60, check=False)


def test_a_terminal_without_utf8_gets_escapes(tmp_path: Path) -> None:
    text = SMALLEST.replace("rows", "r\u00f6ws") + "training: {warmup_steps: 0}\n"
    written(tmp_path, text, name="r\u00e9.yaml")
    (tmp_path / "r\u00f6ws.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    done = lorafit("validate", "r\u00e9.yaml", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    done = lorafit("validate", "r\u00e9.yaml", "--json", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)


def test_a_directory_that_is_gone_is_said(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    leave = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from lorafit.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", leave], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: the current directory no longer exists; change into one that does (`cd`)\n"


def test_the_home_directory_is_found_where_no_shell_has_done_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _exit_code(["init", "--output=~/x.yaml"]) == 0
    assert _exit_code(["schema", "--output", "~/schema.json"]) == 0
    assert (tmp_path / "x.yaml").is_file() and (tmp_path / "schema.json").is_file()


def test_an_output_dir_that_cannot_be_made_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from lorafit.storage.run_lock import RunLock

    with pytest.raises(RunDirError, match=r"cannot be made|not writable"):
        RunLock(RunDir(Path("/proc/x/y"))).take()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_of_an_adapter_nested_too_deep_are_one_line(tmp_path: Path, name: str) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    deep = b"[" * 100_000
    content = len(deep).to_bytes(8, "little") + deep if name.endswith("tensors") else deep
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError, match="copy the file again"):
        read_adapter(tmp_path, base="nowhere")


def test_an_adapter_that_may_not_be_read_names_the_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    def refused(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(adapter_files, "read_regular", refused)  # root reads everything
    with pytest.raises(AdapterError, match=r"cannot be read \(Permission denied\): give your user the right to"):
        read_adapter(tmp_path, base="nowhere")
