"""Machines meet, compare what they are about to do, and notice when one is gone. No torch, on the loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest

from lorafit.launching.launch import free_port
from support import SUPPORT
from support.commands import ENVIRONMENT

MEETING = SUPPORT / "meeting.py"
NAME = socket.gethostname()


def start(rank: int, *, port: int, count: int = 2, **more: Any) -> subprocess.Popen[str]:
    given = {"rank": rank, "count": count, "port": port, "facts": {"seed": 1}} | more
    words = [sys.executable, str(MEETING), json.dumps(given)]
    return subprocess.Popen(words, env=dict(ENVIRONMENT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    try:
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, out.splitlines()


def both(*, first: Mapping[str, Any] = {}, other: Mapping[str, Any] = {}) -> list[tuple[int, list[str]]]:
    port = free_port()
    return [ended(one) for one in [start(0, port=port, **first), start(1, port=port, **other)]]


def test_machines_of_one_mind_meet_in_any_order_and_go_on_after_exec() -> None:
    port = free_port()
    others = [start(rank, port=port, count=3, then="again") for rank in (2, 1)]
    time.sleep(0.5)
    with socket.create_server(("", 0)):  # something else that runs here
        machines = [start(0, port=port, count=3, then="again"), *others]
        assert [ended(one) for one in machines] == [(0, ["met", "compared again"])] * 3


def test_a_difference_is_named_on_every_machine() -> None:
    ours, theirs = both(other={"facts": {"seed": 2}})
    said = f"machines: machine 1 ({NAME}): seed 1 -> 2; all machines need the same recipe, rows, base and versions"
    assert ours == theirs == (4, [said])


def test_strangers_at_the_port_are_sent_away() -> None:
    port = free_port()
    first = start(0, port=port)
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"machine": "x"}\n', b"\xff\n"):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                    connection.sendall(sent)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    other = start(1, port=port)
    assert [ended(one) for one in (first, other)] == [(0, ["met", "compared again"])] * 2


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"count": 3}, "is one of 3 machines there, one of 2 on machine 0"),
        ({"rank": 0}, "port {port} is in use on this machine; name another with --main-address HOST:PORT on all"),
    ],
)
def test_a_machine_that_does_not_belong_is_told_so(other: dict[str, Any], said: str) -> None:
    port = free_port()
    first = start(0, port=port, settings={"GATHER_SECONDS": 3})
    time.sleep(0.7)
    code, lines = ended(start(other.pop("rank", 1), port=port, **other))
    assert code == 4 and len(lines) == 1
    assert lines[0].endswith(said.format(port=port))
    code, lines = ended(first)
    assert code == 4
    assert "machine 1 of 2 did not come within" in lines[-1]


def test_a_rank_that_is_taken_is_refused() -> None:
    port = free_port()
    first, *both = (start(rank, port=port, count=3) for rank in (0, 1, 1))
    until = time.monotonic() + 30
    while time.monotonic() < until and all(one.poll() is None for one in both):
        time.sleep(0.1)
    refused, taken = sorted(both, key=lambda one: one.poll() is None)
    code, lines = ended(refused)
    assert (code, len(lines)) == (4, 1)
    assert lines[0].endswith(f"machine 1 is {NAME} already; give each machine its own --machine-rank")
    last = start(2, port=port, count=3)
    assert [ended(machine)[0] for machine in (first, taken, last)] == [0, 0, 0]


def test_machines_that_are_there_wait_for_one_that_comes_late() -> None:
    quick = {"BEAT_SECONDS": 0.3, "SILENCE_SECONDS": 3.0}
    port = free_port()
    early = [start(rank, port=port, count=3, settings=quick) for rank in (0, 1)]
    time.sleep(6)
    late = start(2, port=port, count=3, settings=quick)
    assert [ended(machine) for machine in (*early, late)] == [(0, ["met", "compared again"])] * 3


def test_an_address_that_does_not_answer_is_named() -> None:
    port = free_port()
    code, lines = ended(start(1, port=port, settings={"ANSWER_SECONDS": 1.5}))
    said = f"127.0.0.1:{port}: the first machine does not answer within 2 s (Connection refused); start it, or correct"
    assert (code, [line[: len(said)] for line in lines]) == (4, [said])


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("killed", "has ended without a word (killed?)"),
        ("silent", "gives no sign of life any more (2 s): dead or cut off"),
        ("fails", "has ended: stopped at 15/20"),
    ],
)
@pytest.mark.parametrize("gone", [0, 1])
def test_a_machine_that_is_gone_is_named_by_the_others(gone: int, then: str, said: str) -> None:
    quick = {"BEAT_SECONDS": 0.3, "SILENCE_SECONDS": 2.0}
    port = free_port()
    began = time.monotonic()
    leaves = start(gone, port=port, then=then, settings=quick)
    stays = start(1 - gone, port=port, then="waits", settings=quick)
    code, lines = ended(stays)
    assert time.monotonic() - began < 10
    leaves.kill()
    ended(leaves)
    assert (code, lines[0], len(lines)) == (4, "met", 2)
    assert lines[1].startswith(f"machines: machine {gone} ({NAME}) {said}")


def test_a_process_that_starts_others_ends_them_and_itself_after_a_machine_is_gone() -> None:
    port = free_port()
    first, other = start(0, port=port, then="launches"), start(1, port=port, then="killed")
    ended(other)
    said = f"ended by 15: machines: machine 1 ({NAME}) has ended without a word (killed?)"
    code, lines = ended(first)
    assert (code, lines[0], len(lines)) == (0, "met", 2)
    assert lines[1].startswith(said) and lines[1].endswith("told by a file: True")
