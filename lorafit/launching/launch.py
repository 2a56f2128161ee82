"""How a run is spread over processes: the accelerate file, the command that starts them, and which of them this is.

With `preflight.py` the only place that reads the environment. No torch: the command line asks here first.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit import operating_system
from lorafit.launching import placement
from lorafit.launching.placement import ALONE, Place

if TYPE_CHECKING:  # `lorafit --help` answers without pydantic
    from lorafit.recipe.sections import LaunchSection

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parents[1] / "configs"
"""The shipped accelerate files; a link to `configs/` in a checkout, the files themselves in a wheel."""


def config_file(strategy: str) -> Path:
    """The accelerate file of a strategy: a shipped one by name, or the user's own by path."""
    return Path(strategy) if Path(strategy).is_absolute() else CONFIGS / f"{strategy}.yaml"


def rank() -> int:
    """This process's number among those that train together; 0 when it trains alone."""
    return int(os.environ["RANK"]) if is_worker() else 0


def is_worker() -> bool:
    """Whether accelerate or torchrun started this process as one of those that train."""
    return placement.is_process_of_a_launcher(os.environ)


def machine_rank() -> int:
    """The number of this machine among those of the run, in a process that trains there."""
    return int(os.environ.get("GROUP_RANK") or "0") if is_worker() else 0


def place_of_this_machine(
    section: LaunchSection, variables: Mapping[str, str], *, rank: int | None, main_address: str | None
) -> Place:
    """Which machine of the run this is; what other launchers left behind in `variables` is said in a line."""
    if is_worker():
        return ALONE
    told = placement.told(variables)
    count = None if section.machines == "auto" else section.machines
    place = placement.settled(told.place, machines=count, rank=rank, main_address=main_address)
    if told.left_aside:
        logger.info(f"left aside: {', '.join(told.left_aside)} of another launcher, which did not start this process")
    if place.told_by and place.count > 1:
        logger.info(str(place))
    return place


def take_variables() -> dict[str, str]:
    """What launchers have told a process that none of them started to train, taken out of its environment: torch and
    accelerate would wait for others who are not there. Raises MachineError where a started one was told nonsense.
    """
    if threads := os.environ.get("OMP_NUM_THREADS"):  # `4,2`: of nested loops, which accelerate cannot read
        os.environ["OMP_NUM_THREADS"] = threads.partition(",")[0].strip()
        if not os.environ["OMP_NUM_THREADS"].isdecimal() or not int(os.environ["OMP_NUM_THREADS"]):
            del os.environ["OMP_NUM_THREADS"]
    if is_worker():
        placement.refuse_contradictions_of_a_launcher(os.environ)
        return {}
    of_slurm = {name: text for name, text in os.environ.items() if name.startswith("SLURM_")}
    return of_slurm | {name: os.environ.pop(name) for name in placement.FOREIGN if name in os.environ}


def processes_here() -> int:
    """Processes of this run on this machine; 1 when it trains alone."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"]) if is_worker() else 1


def name_processes_here(count: int) -> None:
    """Say how many there are: on a CPU accelerate writes down one where the launcher did not say."""
    os.environ["LOCAL_WORLD_SIZE"] = str(count)


def end_with_launcher() -> None:
    """This process ends when the one that started it does, however that ended: one of ours, which has left its number,
    or another launcher. What a user started outlives the shell."""
    number = os.environ.pop("LORAFIT_LAUNCHER", "")  # not for what this process starts
    if number or is_worker():
        operating_system.end_with(int(number) if number else os.getppid())


def name_this_launcher() -> None:
    """Let the processes that this one starts know when it is gone."""
    os.environ["LORAFIT_LAUNCHER"] = str(os.getpid())


def name_sign_of_lost_machine(path: Path) -> None:
    """Let the processes that this one starts know by a file that another machine is gone."""
    os.environ["LORAFIT_LOST_MACHINE"] = str(path)


def has_lost_machine() -> bool:
    """Whether the process that started this one knows that another machine is gone."""
    path = os.environ.get("LORAFIT_LOST_MACHINE")
    return path is not None and Path(path).exists()


def processes_asked_for(section: LaunchSection, *, gpus: int) -> int:
    """Processes on this machine: what the recipe says; by itself one a GPU, or what started this process chose."""
    if section.num_processes != "auto":
        return section.num_processes
    return processes_here() if is_worker() else max(gpus, 1)


def needs_processes(section: LaunchSection, *, gpus: int, place: Place = ALONE) -> bool:
    """Whether this process cannot train by itself and has to start those that do."""
    is_one = place.count == 1 and section.strategy == "ddp" and processes_asked_for(section, gpus=gpus) == 1
    return not is_worker() and not is_one


def is_first_machine(section: LaunchSection) -> bool:
    """Whether the processes of this machine hold the first of all, as an accelerate file of the user's says it."""
    if not Path(section.strategy).is_absolute():
        return True
    found = re.search(r"^machine_rank:\s*(\d+)", Path(section.strategy).read_text(encoding="utf-8"), re.MULTILINE)
    return found is None or int(found[1]) == 0


def sharding_asked_for() -> str:
    """What the accelerate file that started this process asks for: `FSDP`, `ZeRO`, or `data parallel`."""
    kinds = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "ZeRO"}
    return next((kind for name, kind in kinds.items() if os.environ.get(name, "").lower() == "true"), "data parallel")


def first_hands_weights_on() -> bool:
    """Whether accelerate gives every process its part of the first one's weights, whatever the others hold."""
    wanted = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_VERSION": "2"}
    return all(os.environ.get(name, "").lower() == value for name, value in wanted.items())


def shards_by_fsdp(section: LaunchSection) -> bool:
    """Whether the recipe says so, or the accelerate file that started this process."""
    return section.strategy == "fsdp2" or sharding_asked_for() == "FSDP"


def launch_command(
    section: LaunchSection,
    arguments: Sequence[str],
    *,
    gpus: int,
    run: Path | None = None,
    place: Place = ALONE,
    link: str | None = None,
) -> list[str]:
    """The command that trains `lorafit ARGUMENTS` in as many processes as the recipe asks for; `run` is what this
    process has locked, and `link` its connections to other machines: both go on being held by that command."""
    count = processes_asked_for(section, gpus=gpus)
    own_count = section.num_processes == "auto" and Path(section.strategy).is_absolute() and place.count == 1
    return [
        *(sys.executable, "-m", "lorafit", "processes"),
        *(() if run is None else ("--run-dir", str(run))),
        *(() if link is None else ("--link", link)),
        *("--config_file", str(config_file(section.strategy))),
        *(() if own_count else ("--num_processes", str(count * place.count))),
        *(_meeting(place) if place.count > 1 else _alone(section)),
        *("--mixed_precision", "no"),  # the recipe's training.bf16 decides
        *("--num_cpu_threads_per_process", str(_threads(count, gpus=gpus))),
        *("-m", "lorafit", *arguments),
    ]


def _alone(section: LaunchSection) -> tuple[str, ...]:
    """A port that is free, so that two runs on one machine do not meet; a file of the user's may name one."""
    return () if Path(section.strategy).is_absolute() else ("--main_process_port", "0")


def _meeting(place: Place) -> tuple[str, ...]:
    """Where the processes of all machines meet: they are all there, so none waits long."""
    return (
        *("--num_machines", str(place.count), "--machine_rank", str(place.rank), "--same_network"),
        *("--main_process_ip", place.host, "--main_process_port", str(place.port), "--rdzv_conf", "timeout=120"),
    )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def use_interface(name: str | None) -> None:
    """Let gloo meet the other machines there: it would take the address that this machine's own name stands for."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a warning for each address without a name
    if name and "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _threads(count: int, *, gpus: int) -> int:
    """OMP_NUM_THREADS of each process: the user's, else 1 beside a GPU (torchrun's), else its share of the cores."""
    if (chosen := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
        return int(chosen)
    return 1 if gpus else max(1, operating_system.usable_cores() // count)


def environment_alone() -> dict[str, str]:
    """The environment of a process that trains with no other, whatever this one does."""
    of_others = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in placement.FOREIGN and not name.startswith(of_others)
    }


def environment_beside(index: int, *, count: int, gpus: int) -> dict[str, str]:
    """The environment of one of `count` processes that work side by side: one GPU, or its share of the cores."""
    own = {"OMP_NUM_THREADS": str(_threads(count, gpus=gpus))}
    if gpus:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        own["CUDA_VISIBLE_DEVICES"] = seen[index % len(seen)]
    return dict(os.environ) | own


def use_expandable_segments() -> None:
    """Let CUDA's allocator grow its segments, which wastes less than new ones; the user's own settings stay.

    Read when torch first allocates, here and in the processes that this one starts.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def replace_this_process(command: list[str]) -> None:
    """Become `command`: no shell, and no parent left behind to hold memory or a GPU."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def is_first_to_fail() -> bool:
    """Whether no process of this run has reported an error yet; asking is claiming.

    Processes that train together mostly fail together. The launcher gives each of them a file for its error, in one
    directory that is new for every start; a file there can be created by one of them only.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return True
    try:
        os.close(os.open(Path(error_file).parents[1] / "reported", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
