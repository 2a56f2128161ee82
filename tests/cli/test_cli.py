"""The command as a script calls it: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafit.cli import _exit_code
from support.runs import small_recipe


def test_json_is_the_only_thing_on_stdout(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.training import train as train_module

    run_training = train_module.run_training

    def talkative(*rest: object, **named: object) -> object:
        print("a library prints this")
        return run_training(*rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(train_module, "run_training", talkative)
    loaded = small_recipe(tmp_path, tiny_base)
    assert _exit_code(["train", str(loaded.path), "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["outcome"] == "finished"
    assert "a library prints this" in printed.err
    assert {
        *("run", "adapter", "steps", "tokens", "eval_loss_before", "eval_loss_after"),
        *("peak_memory_bytes", "seconds", "outcome"),
    } <= result.keys()


def test_quiet_prints_the_result_alone(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    assert _exit_code(["train", str(loaded.path), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "held-out loss" in printed.out


def test_output_dir_goes_before_the_recipes(tmp_path: Path, tiny_base: Path) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    assert _exit_code(["train", str(loaded.path), "--quiet", "--output-dir", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there/adapter/adapter_model.safetensors").is_file()
    assert not (tmp_path / "run").exists()


def test_the_bare_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Usage: lorafit ") and "rank-sweep" in printed.err and "error" not in printed.err


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *(("evl", "eval"), ("evaluate", "eval"), ("rank_sweep", "rank-sweep"), ("sweep", "rank-sweep")),
        *((word, None) for word in ("chat", "serve", "export", "import", "inspect", "push", "verify", "x", "")),
    ],
)
def test_a_command_is_suggested_only_where_it_is_near(
    word: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code([word]) == 2
    [line] = capsys.readouterr().err.splitlines()
    mend = f"did you mean {meant}?" if meant else "there are train, merge, combine, "
    assert f"no such command; {mend}" in line and "processes" not in line


def test_a_shell_completes_commands_and_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def completed(words: str) -> list[str]:
        monkeypatch.setenv("_LORAFIT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit):
            _exit_code([])
        return capsys.readouterr().out.split()

    assert completed("lorafit ra") == ["rank-sweep"]
    assert completed("lorafit train --re") == ["--resume", "--restart"]
    assert completed("lorafit chat --re") == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train"], 2, "Missing argument 'RECIPE'"),
        (["train", "RECIPE", "--nope"], 2, "No such option: --nope"),
        (["trian"], 2, "trian: no such command; did you mean train?"),
        (["train", "missing.yaml"], 2, "missing.yaml: no such file"),
        (["train", "RECIPE", "--set", "lora.r=0"], 2, "lora.r: 0 is not a whole number of at least 1"),
        (["train", "RECIPE", "--set", "data.train=[{path: gone.jsonl}]"], 3, "gone.jsonl: does not exist"),
        (["train", "RECIPE", "--set", "model.model_name_or_path=./gone"], 4, "there is no such directory"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    tiny_base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    monkeypatch.chdir(tmp_path)
    given = [str(loaded.path) if argument == "RECIPE" else argument for argument in arguments]
    assert _exit_code(given) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "run").exists()
