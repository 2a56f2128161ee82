"""The shipped accelerate files, read by accelerate itself."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

from lorafit.launching import launch
from lorafit.recipe.paths import STRATEGIES
from support import ROOT

CONFIGS = ROOT / "configs"
EXPECTED = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "two_nodes": DistributedType.MULTI_GPU,
}


def command_in_header(name: str) -> list[str]:
    """The words of the `accelerate launch` command that the file's own header gives."""
    lines = [line.lstrip("# ") for line in (CONFIGS / f"{name}.yaml").read_text("utf-8").splitlines() if line[0] == "#"]
    text = " ".join(lines)
    start = text.index("accelerate launch ")
    return [*shlex.split(text[start : text.index("RECIPE", start)].replace("\\ ", "")), "RECIPE"][2:]


def test_there_is_a_file_for_every_strategy_and_one_for_two_nodes() -> None:
    assert {path.stem for path in CONFIGS.glob("*")} == EXPECTED.keys() == {*STRATEGIES, "two_nodes"}
    for strategy in STRATEGIES:
        assert launch.config_file(strategy).samefile(CONFIGS / f"{strategy}.yaml")


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_file_and_the_command_in_its_header(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == EXPECTED[name]
    assert config.mixed_precision == "no", "the recipe decides"
    arguments = launch_command_parser().parse_args(command_in_header(name))
    assert arguments.config_file == f"configs/{name}.yaml"
    assert (arguments.module, arguments.training_script) == (True, "lorafit")
    assert arguments.training_script_args == ["train", "RECIPE"]
    arguments.config_file = str(CONFIGS / f"{name}.yaml")
    settled, _, _ = _validate_launch_command(arguments)
    assert settled.num_processes > 1
    assert settled.num_machines == (2 if name == "two_nodes" else 1)


def settled(name: str) -> Any:
    parser = launch_command_parser()
    return _validate_launch_command(parser.parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "x.py"]))[0]


def test_fsdp2_asks_for_version_two_with_whole_adapters_and_lean_loading() -> None:
    environment = prepare_multi_gpu_env(settled("fsdp2"))
    wanted = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }
    assert {name: environment.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_ask_for_their_stage_and_leave_the_rest_to_the_recipe(stage: int) -> None:
    arguments = settled(f"zero{stage}")
    assert arguments.use_deepspeed
    assert arguments.zero_stage == stage
    assert (arguments.gradient_accumulation_steps, arguments.gradient_clipping) == ("auto", "auto")
