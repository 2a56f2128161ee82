"""What lorafit says while it works goes to loggers; a command prints it, and leaves the loggers as they were."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lorafit.cli import _exit_code
from lorafit.cli.stderr import keep_quiet, lines_on_stderr
from lorafit.lines import heard, unsaid
from support.runs import small_recipe
from support.tiny import sums, write_jsonl

LORAFIT = logging.getLogger("lorafit")
ROOM, OTHER = logging.getLogger("lorafit.training.train"), logging.getLogger("lorafit.sweep.trial")


def test_a_command_prints_each_line_once_and_leaves_the_loggers_alone(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a library prints what reaches the root logger."""
    loaded = small_recipe(tmp_path, tiny_base)
    write_jsonl(tmp_path / "train.jsonl", [*sums(24), *sums(3)])  # three of them twice
    before = LORAFIT.level, LORAFIT.propagate, [*LORAFIT.handlers]
    printing = logging.StreamHandler()
    logging.getLogger().addHandler(printing)
    try:
        assert _exit_code(["validate", str(loaded.path)]) == 0
    finally:
        logging.getLogger().removeHandler(printing)
    said = [line for line in capsys.readouterr().err.splitlines() if "duplicate" in line]
    assert len(said) == 1 and said[0].startswith("warning: ")
    assert before == (LORAFIT.level, LORAFIT.propagate, [*LORAFIT.handlers])


def test_lines_come_to_stderr_at_once_harmless_and_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    with lines_on_stderr():
        ROOM.info("100 % of %s")
        OTHER.warning("a\x1b[31m")
        ROOM.debug("detail")
        assert capsys.readouterr() == ("", "100 % of %s\nwarning: a\\x1b[31m\n")
        keep_quiet(False)
        ROOM.info("b")
        keep_quiet()
        ROOM.warning("c")
    assert capsys.readouterr() == ("", "b\n")


def test_what_goes_wrong_with_stderr_is_not_swallowed() -> None:
    def broken(line: str) -> None:
        raise BrokenPipeError

    with heard(broken), pytest.raises(BrokenPipeError):
        ROOM.info("a")


def test_one_room_can_go_unsaid() -> None:
    said: list[str] = []
    with heard(said.append):
        with unsaid("lorafit.training"):
            ROOM.warning("a")
            OTHER.warning("b")
        ROOM.info("c")
    ROOM.warning("nobody hears this")
    assert said == ["warning: b", "c"]
