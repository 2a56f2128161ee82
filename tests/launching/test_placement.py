"""Which machine of a run this is: what launchers say in variables, and what they only left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from lorafit.errors import MachineError
from lorafit.launching import launch, placement
from lorafit.launching.placement import Place
from support.commands import command, finished
from support.runs import small_recipe

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"}
PODS = {
    **{"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_NPROC_PER_NODE": "8"},
    **{"PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456"},
}
STEP = {
    **{"SLURM_JOB_ID": "40123", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"},
    **{"SLURM_NODEID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "node[03-04,9],login"},
}


BY_PET, BY_SLURM = "PET_NNODES and PET_NODE_RANK", "SLURM_NODEID and SLURM_STEP_NUM_NODES"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (PODS, Place(3, 4, "job-master-0", 23456, BY_PET, 8)),
        (PODS | {"RANK": "3", "WORLD_SIZE": "32", **MEETING}, Place(3, 4, "job-master-0", 23456, BY_PET, 8)),
        ({"PET_NNODES": "1", "RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, told_by="PET_NNODES")),
        ({"RANK": "1", "WORLD_SIZE": "2", **MEETING}, Place(1, 2, "10.0.0.1", 23456, "RANK and WORLD_SIZE")),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, Place(1, 2, "a", 29500, "RANK and WORLD_SIZE")),
        ({"RANK": "0", "WORLD_SIZE": "1", **MEETING}, Place(0, 1, told_by="RANK and WORLD_SIZE")),
        (STEP, Place(1, 2, "node03", 20123, BY_SLURM)),
        (STEP | MEETING, Place(1, 2, "10.0.0.1", 23456, BY_SLURM)),
        (STEP | {"PMI_SIZE": "2", "PMI_RANK": "1", "PMIX_RANK": "1"}, Place(1, 2, "node03", 20123, BY_SLURM)),
        (STEP | {"WORLD_SIZE": "16"}, Place(1, 2, "node03", 20123, BY_SLURM)),
        # The batch script itself, an interactive shell, a step of one task.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, None),
        (STEP | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_launchers_say_which_machine_this_is(variables: dict[str, str], expected: Place | None) -> None:
    assert placement.told(variables).place == expected


@pytest.mark.parametrize(
    ("variables", "left"),
    [
        ({"RANK": "0"}, ("RANK=0",)),
        ({"RANK": ""}, ("RANK=",)),
        ({"LOCAL_RANK": "0"}, ("LOCAL_RANK=0",)),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, ("PMI_SIZE=1", "PMI_RANK=0")),
        ({"OMPI_COMM_WORLD_SIZE": "1", "WORLD_SIZE": "1"}, ("WORLD_SIZE=1", "OMPI_COMM_WORLD_SIZE=1")),
        ({"ACCELERATE_USE_FSDP": "true"}, ("ACCELERATE_USE_FSDP=true",)),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False", **MEETING}, ()),
    ],
)
def test_what_speaks_of_no_other_process_is_left_aside(variables: dict[str, str], left: tuple[str, ...]) -> None:
    told = placement.told(variables)
    assert (told.place, told.left_aside) == (None, left)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"WORLD_SIZE": "4", **MEETING},
            "one of several, without RANK and LOCAL_RANK; to train on this machine alone: `env "
            "-u WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT lorafit train RECIPE`",
        ),
        ({"RANK": "2"}, "RANK=2: another launcher"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1: another launcher"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "this is one of 4 machines, MASTER_ADDR is missing"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "one of 2 machines, PET_MASTER_ADDR is missing"),
        ({"PET_NNODES": "2", **MEETING}, "PET_NODE_RANK is missing"),
        ({"PMI_SIZE": "4"}, "one of several; to train on this machine alone: `env -u PMI_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2: another"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE=2"),
        ({"MPI_LOCALNRANKS": "2"}, "MPI_LOCALNRANKS=2"),
        ({"RANK": "4", "WORLD_SIZE": "4", **MEETING}, "WORLD_SIZE=4 contradict each other: ranks go from 0 to 3"),
        ({"RANK": "-1", "WORLD_SIZE": "4", **MEETING}, "contradict each other"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK=one is not a number; `env -u RANK"),
        ({"PMI_SIZE": "4x"}, "PMI_SIZE=4x is not a number"),
        (PODS | {"PET_NNODES": "1:4"}, "PET_NNODES=1:4: the number of machines must be one number"),
        (PODS | {"PET_NODE_RANK": "4"}, "PET_NNODES=4, PET_NODE_RANK=4 contradict each other"),
        (PODS | {"WORLD_SIZE": "6"}, "WORLD_SIZE=6, PET_NNODES=4, PET_NPROC_PER_NODE=8 contradict each other"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "16"}, "srun started 16 tasks on 2 machines (SLURM_STEP_NUM_TASKS)"),
        (
            STEP | {"RANK": "0", "WORLD_SIZE": "2", **MEETING},
            "machine 0 of 2, SLURM_NODEID and SLURM_STEP_NUM_NODES machine 1",
        ),
        (STEP | {"WORLD_SIZE": "5"}, "WORLD_SIZE=5: another launcher"),
    ],
)
def test_what_speaks_of_others_is_obeyed_or_refused_by_name(variables: dict[str, str], said: str) -> None:
    with pytest.raises(MachineError) as refused:
        placement.told(variables)
    assert said in str(refused.value)
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("a,b", "a"), ("node[03-05,9],login", "node03"), ("r[1-2]n[04-8]", "r1n04"), ("", "")],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert placement.first_host(nodes) == first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", ("10.0.0.1", 29500)),
        ("gpu-1.cluster:4000", ("gpu-1.cluster", 4000)),
        ("[fd00::1]:4000", ("fd00::1", 4000)),
        ("fd00::1", ("fd00::1", 29500)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert placement.address(text) == expected


@pytest.mark.parametrize("text", ["", "host:", "host:0", "host:70000", "ho st", "tcp://host"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(MachineError, match="is not HOST or HOST:PORT"):
        placement.address(text)


def test_the_command_line_places_a_machine() -> None:
    place = placement.settled(None, machines=2, rank=1, main_address="10.0.0.1:4000")
    assert place == Place(1, 2, "10.0.0.1", 4000)
    assert placement.settled(None, machines=None, rank=None, main_address=None) == placement.ALONE
    told = placement.told(STEP).place
    assert placement.settled(told, machines=2, rank=None, main_address="other") == Place(
        1, 2, "other", 29500, "SLURM_NODEID and SLURM_STEP_NUM_NODES"
    )


@pytest.mark.parametrize(
    ("variables", "given", "said"),
    [
        ({}, {"machines": 2, "rank": 2, "main_address": "a"}, "--machine-rank: 2: there are 2 machines, 0 to 1"),
        ({}, {"machines": 2, "rank": -1, "main_address": "a"}, "--machine-rank: -1: there are 2 machines"),
        ({}, {"machines": 2}, "launch.machines: 2 machines, but not which of them this is"),
        ({}, {"machines": 2, "rank": 0}, "where they meet"),
        ({}, {"rank": 1, "main_address": "a"}, "goes with launch.machines"),
        ({}, {"machines": 1, "rank": 1}, "1: there is one machine"),
        (STEP, {"machines": 3}, "launch.machines is 3, SLURM_NODEID and SLURM_STEP_NUM_NODES say 2"),
        (STEP, {"rank": 0}, "--machine-rank is 0, SLURM_NODEID and SLURM_STEP_NUM_NODES say 1"),
    ],
)
def test_a_place_that_cannot_be_is_refused(variables: dict[str, str], given: Mapping[str, object], said: str) -> None:
    asked = {"machines": None, "rank": None, "main_address": None} | dict(given)
    with pytest.raises(MachineError) as refused:
        placement.settled(placement.told(variables).place, **asked)  # type: ignore[arg-type]
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2 contradict"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1, LOCAL_WORLD_SIZE=1 contradict"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4, WORLD_SIZE=2 contradict"),
        ({"GROUP_RANK": "2", "GROUP_WORLD_SIZE": "2"}, "GROUP_RANK=2, GROUP_WORLD_SIZE=2 contradict"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
    ],
)
def test_a_started_process_whose_numbers_contradict_each_other_is_refused(
    changed: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEETING} | changed).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(MachineError) as refused:
        launch.take_variables()
    assert said in str(refused.value)


@pytest.mark.parametrize(("threads", "kept"), [("4,2", "4"), ("3", "3"), ("many", None), ("0", None), ("", "")])
def test_of_nested_thread_counts_the_first_is_taken(
    threads: str, kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    launch.take_variables()
    assert os.environ.get("OMP_NUM_THREADS") == kept
    assert launch.environment_beside(0, count=1, gpus=1)["OMP_NUM_THREADS"] == (kept or "1")


def test_a_run_trains_beside_what_launchers_left_and_is_refused_beside_what_they_began(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    for name, text in {"RANK": "", "LOCAL_RANK": "0", "PMI_SIZE": "1", "OMP_NUM_THREADS": "1,1"}.items():
        monkeypatch.setenv(name, text)
    code, out, err = finished(command(tmp_path, "lorafit", "train", str(loaded.path), "--json"))
    assert code == 0, err
    assert json.loads(out)["steps"] == 3
    left = "left aside: RANK=, LOCAL_RANK=0, PMI_SIZE=1 of another launcher, which did not start this process"
    assert left in err.splitlines()

    for name, text in {"WORLD_SIZE": "4", **MEETING}.items():
        monkeypatch.setenv(name, text)
    code, out, err = finished(command(tmp_path, "lorafit", "train", str(loaded.path), "--json"))
    assert (code, out) == (4, "")
    assert err.startswith("error: environment: WORLD_SIZE=4: another launcher") and len(err.splitlines()) == 1
    code, _, err = finished(command(tmp_path, "lorafit", "validate", str(loaded.path)))
    assert code == 0, err
