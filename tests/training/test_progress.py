"""What people see while something takes long and there is no terminal to draw a bar on."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafit import pulse
from lorafit.cli import _exit_code
from lorafit.launching.child import Child
from lorafit.lines import heard
from lorafit.training.progress import ProgressLines
from lorafit.training.train import train
from support.runs import cache_of, run, small_recipe


def test_a_run_in_a_pipe_says_its_loss_speed_and_time_left(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "LEAST_SECONDS", 0.0)
    loaded = small_recipe(tmp_path, tiny_base)
    assert _exit_code(["train", str(loaded.path)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == ["step 0/3", "step 1/3", "step 2/3", "step 3/3"]
    assert lines[0].startswith("step 0/3: held-out loss ")
    for line in lines[1:3]:
        assert " loss " in line and " tokens/s, " in line and line.endswith(" s left")
    assert "left" not in lines[3]


def test_lines_with_news_keep_their_distance_and_silence_has_an_end(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps_said(**training: int) -> list[str]:
        said: list[str] = []
        loaded = small_recipe(tmp_path, tiny_base, training=training, output_dir=str(tmp_path / f"run{len(training)}"))
        with heard(said.append):
            train(loaded, cache_dir=cache_of(tmp_path), progress=ProgressLines)
        return [line.partition(":")[0] for line in said if line.startswith("step ") and "held-out" not in line]

    monkeypatch.setattr(pulse, "LEAST_SECONDS", 1000.0)
    assert steps_said() == ["step 1/3"]  # the first at once
    monkeypatch.setattr(pulse, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(pulse, "LEAST_SECONDS", 0.0)
    assert steps_said(logging_steps=100) == ["step 1/3", "step 2/3", "step 3/3"]


def test_a_long_evaluation_gives_a_sign_of_life(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "MOST_SECONDS", 0.0)
    said: list[str] = []
    loaded = small_recipe(tmp_path, tiny_base, training={"per_device_eval_batch_size": 4})
    with heard(said.append):
        train(loaded, cache_dir=cache_of(tmp_path), progress=ProgressLines)
    assert "step 0/3: held-out rows, batch 1 of 2" in said


def test_a_run_without_progress_says_none(tmp_path: Path, tiny_base: Path) -> None:
    _, said = run(small_recipe(tmp_path, tiny_base))
    assert not [line for line in said if line.startswith("step ")]


def test_a_count_tells_how_far_it_is_every_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lorafit.pulse.time.monotonic", lambda: now[0])
    said: list[str] = []
    counted = pulse.counting_in_lines("rows scored", 100)
    with heard(said.append):
        for _ in range(100):
            now[0] += 1.0
            counted(1)
    assert said == [
        *("rows scored: 30 of 100, 1 min 10 s left", "rows scored: 60 of 100, 40.0 s left"),
        "rows scored: 90 of 100, 10.0 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.04, "0.0 s"), (59.4, "59.4 s"), (229, "3 min 49 s"), (7500, "2 h 05 min")]
)
def test_a_duration_is_told_as_people_do(seconds: float, said: str) -> None:
    assert pulse.duration(seconds) == said


def test_an_evaluation_and_a_merge_count_what_they_do(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = small_recipe(tmp_path, tiny_base, eval={"generate": {"max_new_tokens": 2, "answers_at_once": 3}})
    result, _ = run(loaded)
    monkeypatch.setattr(pulse, "MOST_SECONDS", 0.0)
    capsys.readouterr()
    assert _exit_code(["eval", result.run]) == 0
    said = capsys.readouterr().err
    assert "base: answers: 3 of 8, " in said and "adapter: answers: 6 of 8, " in said
    assert _exit_code(["merge", result.run, "--no-verify"]) == 0
    assert "merge: bytes written: " in capsys.readouterr().err


def test_a_process_that_takes_long_is_said_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "MOST_SECONDS", 0.001)
    said: list[str] = []
    with heard(said.append):
        assert Child("os.path:basename", "a/b").answer() == "b"
    assert said
    assert all(line.startswith("path: ") and line.endswith(" s so far") for line in said)
