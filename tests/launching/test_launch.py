"""The command that starts several processes, and who speaks for them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from lorafit import cli
from lorafit.errors import MachineError
from lorafit.launching import launch
from lorafit.launching.placement import Place
from lorafit.preflight import Machine, refuse_what_this_machine_lacks
from lorafit.recipe.sections import LaunchSection
from support.runs import small_recipe

STARTED = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if started from a shell that says nothing of processes and threads."""
    for name in (*STARTED, "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_ERROR_FILE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


def section(**keys: object) -> LaunchSection:
    return LaunchSection.model_validate(keys)


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_auto_is_one_process_a_gpu_and_one_without() -> None:
    assert launch.processes_asked_for(section(), gpus=0) == 1
    assert launch.processes_asked_for(section(), gpus=8) == 8
    assert launch.processes_asked_for(section(num_processes=2), gpus=8) == 2


def test_auto_is_what_was_started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in STARTED.items():
        monkeypatch.setenv(name, text)
    assert launch.processes_asked_for(section(), gpus=8) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launch.processes_asked_for(section(), gpus=8) == 2, "of two machines, those of this one"
    assert launch.rank() == 1


@pytest.mark.parametrize(
    ("keys", "gpus", "expected"),
    [
        ({}, 0, False),
        ({}, 1, False),
        ({}, 2, True),
        ({"num_processes": 2}, 0, True),
        ({"num_processes": 1}, 8, False),
        ({"num_processes": 1, "strategy": "fsdp2"}, 1, True),
    ],
)
def test_processes_are_started_only_where_one_does_not_do(keys: dict[str, object], gpus: int, expected: bool) -> None:
    assert launch.needs_processes(section(**keys), gpus=gpus) is expected


def test_a_started_process_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in STARTED.items():
        monkeypatch.setenv(name, text)
    assert not launch.needs_processes(section(num_processes=4), gpus=8)


def test_the_command_is_a_list_that_ends_with_what_the_user_typed() -> None:
    typed = ["train", "my recipe.yaml", "--set", "lora.r=4; rm -rf x"]
    command = launch.launch_command(section(num_processes=2, strategy="zero3"), typed, gpus=2)
    assert command[:4] == [sys.executable, "-m", "lorafit", "processes"]
    assert command[-len(typed) - 2 :] == ["-m", "lorafit", *typed]
    assert value(command, "--num_processes") == "2"
    assert Path(value(command, "--config_file")).name == "zero3.yaml"


def test_a_file_of_the_users_keeps_its_own_count_unless_the_recipe_has_one(tmp_path: Path) -> None:
    own = str(tmp_path / "cluster.yaml")
    assert "--num_processes" not in launch.launch_command(section(strategy=own), ["train"], gpus=2)
    command = launch.launch_command(section(strategy=own, num_processes=4), ["train"], gpus=2)
    assert value(command, "--config_file") == own
    assert value(command, "--num_processes") == "4"


def test_processes_of_several_machines_are_counted_together_and_meet_at_the_first() -> None:
    place = Place(1, 2, "10.0.0.1", 4000)
    assert launch.needs_processes(section(num_processes=1), gpus=0, place=place)
    command = launch.launch_command(section(num_processes=4), ["train"], gpus=4, place=place, link="[]")
    said = {option: value(command, option) for option in ("--num_machines", "--machine_rank", "--main_process_ip")}
    assert said == {"--num_machines": "2", "--machine_rank": "1", "--main_process_ip": "10.0.0.1"}
    assert (value(command, "--num_processes"), value(command, "--main_process_port")) == ("8", "4000")
    assert value(command, "--link") == "[]"


def test_cpu_processes_share_the_cores_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)

    def threads(count: int, gpus: int) -> str:
        command = launch.launch_command(section(num_processes=count), ["train"], gpus=gpus)
        return value(command, "--num_cpu_threads_per_process")

    assert threads(2, gpus=0) == "8"
    assert threads(32, gpus=0) == "1"
    assert threads(2, gpus=2) == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(2, gpus=0) == "3"


def test_one_process_of_a_run_reports_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.is_first_to_fail()
    assert launch.is_first_to_fail(), "alone, every error is reported"
    for process in ("0", "1"):
        (tmp_path / process).mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1" / "error.json"))
    assert launch.is_first_to_fail()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    assert not launch.is_first_to_fail()


def machine(gpus: int) -> Machine:
    return Machine(device="cuda" if gpus else "cpu", name="x", gpus=gpus, has_bf16=True, memory_bytes=2**33)


@pytest.mark.parametrize(
    ("keys", "gpus", "said"),
    [
        ({"strategy": "fsdp2"}, 0, "launch.strategy: fsdp2 splits the model over GPUs, there is none; write ddp"),
        ({"strategy": "zero3"}, 2, "launch.strategy: zero3 needs the package deepspeed"),
        ({"num_processes": 3}, 2, "launch.num_processes: 3 processes, but this machine has 2 GPUs"),
    ],
)
def test_what_cannot_start_here_is_said_before_anything_starts(
    tmp_path: Path, keys: dict[str, object], gpus: int, said: str
) -> None:
    assert importlib.util.find_spec("deepspeed") is None
    loaded = small_recipe(tmp_path, tmp_path / "base", launch=keys)
    with pytest.raises(MachineError, match=said):
        refuse_what_this_machine_lacks(loaded, machine(gpus))
    refuse_what_this_machine_lacks(small_recipe(tmp_path, tmp_path / "base"), machine(gpus))


def test_processes_on_other_machines_are_not_counted_against_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (STARTED | {"WORLD_SIZE": "16"}).items():
        monkeypatch.setenv(name, text)
    refuse_what_this_machine_lacks(
        small_recipe(tmp_path, tmp_path / "base", launch={"num_processes": 16}), machine(gpus=8)
    )


@pytest.mark.parametrize("own", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": ""}])
def test_every_command_runs_with_expandable_segments_unless_the_user_chose(
    own: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that what `main` sets is gone after this test
        monkeypatch.delenv(name)
    for name, text in own.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr("sys.argv", ["lorafit", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    seen = {name: os.environ[name] for name in os.environ if name.endswith("ALLOC_CONF")}
    assert seen == (own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
