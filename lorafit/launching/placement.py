"""Which machine of a run this is: as the command line says it, or as torchrun, Kubernetes or SLURM say it in variables.

No torch, and no look at the environment: who asks hands the variables over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorafit.errors import MachineError

USUAL_PORT = 29500
"""torchrun's."""

OF_A_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, accelerate and deepspeed tell each process that they start; all of them, or it was not they."""
OF_TORCHRUN = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE")
OF_KUBERNETES = ("PET_NNODES", "PET_NODE_RANK", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT")
"""Of Kubeflow's jobs; torchrun takes variables of that prefix for its options."""
OF_MPI = (
    *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    *("PMI_SIZE", "PMI_RANK", "PMIX_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
)
OF_ACCELERATE = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION")
FOREIGN = (*OF_A_PROCESS, *OF_TORCHRUN, *OF_KUBERNETES, *OF_MPI, *OF_ACCELERATE)
"""Variables that the libraries below would obey, and that are no business of a process that nobody placed."""

_SIZES = re.compile(r".*(?:SIZE|NNODES|NRANKS)")
_RANKS = re.compile(r".*RANK(?:ID)?")
_FIRST_STEP_OF_SLURM_ITSELF = 0xFFFFFFF0
"""Steps from here on are a batch script, an interactive shell: nobody was started beside them."""


@dataclass(frozen=True)
class Place:
    """One machine of those that a run has."""

    rank: int
    count: int
    host: str = ""
    port: int = USUAL_PORT
    """Where the machines meet: an address of the first."""
    told_by: str = ""
    """The variables that say so; empty where the command line does."""
    processes: int | None = None
    """On this machine, where the variables say that, too."""

    def __str__(self) -> str:
        where = f"{self.host}:{self.port}" if self.told_by else ""
        return f"machine {self.rank} of {self.count}" + (f" at {where}, by {self.told_by}" if where else "")


ALONE = Place(0, 1)


@dataclass(frozen=True)
class Told:
    """What the variables come to."""

    place: Place | None
    """None where they say nothing of machines."""
    left_aside: tuple[str, ...]
    """Variables with a value that say nothing by themselves, as `NAME=value`."""


def is_process_of_a_launcher(variables: Mapping[str, str]) -> bool:
    """Whether torchrun, accelerate or deepspeed started this process as one of those that train."""
    return all(variables.get(name) for name in OF_A_PROCESS)


def refuse_contradictions_of_a_launcher(variables: Mapping[str, str]) -> None:
    """The numbers of a started process fit together. Raises MachineError naming those that do not."""
    for low, high in (
        ("RANK", "WORLD_SIZE"),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("GROUP_RANK", "GROUP_WORLD_SIZE"),
    ):
        rank, size = _number(variables, low), _number(variables, high)
        if rank is not None and size is not None and not 0 <= rank < size:
            raise _contradiction(variables, (low, high), f"ranks go from 0 to {size - 1}")
    local, whole = _number(variables, "LOCAL_WORLD_SIZE"), _number(variables, "WORLD_SIZE")
    if local is not None and whole is not None and local > whole:
        raise _contradiction(variables, ("LOCAL_WORLD_SIZE", "WORLD_SIZE"), "a part is not larger than the whole")


def told(variables: Mapping[str, str]) -> Told:
    """Which machine this is, by the variables of a process that no launcher of ours started.

    Raises MachineError where they contradict each other, and where they speak of other processes but not of all that
    is needed to train with those: alone, each of them would train the same run.
    """
    kubernetes, plain, slurm = _of_kubernetes(variables), _of_ranks(variables), _of_slurm(variables)
    places = [place for place in (kubernetes, plain, slurm) if place is not None]
    for other in places[1:]:
        if (other.rank, other.count) != (places[0].rank, places[0].count):
            message = f"{places[0].told_by} say machine {places[0].rank} of {places[0].count}"
            message = f"{message}, {other.told_by} machine {other.rank} of {other.count}"
            raise MachineError(f"{message}; {_mend(variables, FOREIGN)}", where="environment")
    place = places[0] if places else None
    if place is None or (place is slurm and place.count > 1):
        _refuse_loose_ends(variables, together=place.count if place else 1)
    known = () if place is None else (*OF_A_PROCESS, *OF_KUBERNETES)
    left = tuple(f"{name}={variables[name]}" for name in FOREIGN if name in variables and name not in known)
    said = tuple(text for text in left if not text.startswith(("MASTER_", "ACCELERATE_")) or text.endswith("=true"))
    return Told(place, said)


def _of_kubernetes(variables: Mapping[str, str]) -> Place | None:
    """Kubeflow's PyTorchJob and TrainJob: a pod is a machine."""
    nodes = variables.get("PET_NNODES", "").partition(":")
    if not nodes[0]:
        return None
    if nodes[2] and nodes[2] != nodes[0]:
        message = f"PET_NNODES={variables['PET_NNODES']}: the number of machines must be one number"
        raise MachineError(f"{message}; leave elasticPolicy out of the job", where="environment")
    count = _number({"PET_NNODES": nodes[0]}, "PET_NNODES") or 0
    processes = variables.get("PET_NPROC_PER_NODE", "")
    own = int(processes) if processes.isdecimal() and int(processes) else None
    if count == 1:
        return Place(0, 1, told_by="PET_NNODES", processes=own)
    rank = _number(variables, "PET_NODE_RANK")
    rank = _number(variables, "RANK") if rank is None else rank
    whole = _number(variables, "WORLD_SIZE")
    if whole is not None and whole not in (count, count * (own or 1)):
        raise _contradiction(variables, ("WORLD_SIZE", "PET_NNODES", "PET_NPROC_PER_NODE"), "they count the same pods")
    return _meeting(variables, rank, count, "PET", names=("PET_NNODES", "PET_NODE_RANK"), processes=own)


def _of_ranks(variables: Mapping[str, str]) -> Place | None:
    """RANK and WORLD_SIZE without a rank on its machine: each pod of an older PyTorchJob, or a script of the user's."""
    if variables.get("LOCAL_RANK") or variables.get("PET_NNODES"):
        return None
    rank, count = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    if rank is None or count is None:
        return None
    if count == 1 and rank == 0:
        return Place(0, 1, told_by="RANK and WORLD_SIZE")
    return _meeting(variables, rank, count, "MASTER", names=("RANK", "WORLD_SIZE"))


def _of_slurm(variables: Mapping[str, str]) -> Place | None:
    """A step of srun with one task on each machine."""
    step = _number(variables, "SLURM_STEP_ID")
    tasks = _number(variables, "SLURM_STEP_NUM_TASKS") or _number(variables, "SLURM_NTASKS") or 1
    if step is None or step >= _FIRST_STEP_OF_SLURM_ITSELF or tasks == 1:
        return None
    count = _number(variables, "SLURM_STEP_NUM_NODES") or _number(variables, "SLURM_NNODES") or 1
    if tasks != count:
        message = f"srun started {tasks} tasks on {count} machine{'s' * (count > 1)} (SLURM_STEP_NUM_TASKS)"
        message = f"{message}; lorafit starts the processes of a machine itself"
        mend = f"`srun --nodes {count} --ntasks-per-node 1 lorafit train ...`"
        raise MachineError(f"{message}: {mend}", where="environment")
    if not variables.get("MASTER_ADDR"):
        nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST") or ""
        variables = dict(variables) | {"MASTER_ADDR": first_host(nodes)}
    if not variables.get("MASTER_PORT"):  # a job of its own for each on the same machines
        port = 20000 + (_number(variables, "SLURM_JOB_ID") or 0) % 10000
        variables = dict(variables) | {"MASTER_PORT": str(port)}
    rank = _number(variables, "SLURM_NODEID")
    return _meeting(variables, rank, count, "MASTER", names=("SLURM_NODEID", "SLURM_STEP_NUM_NODES"))


def first_host(nodes: str) -> str:
    """The first of SLURM's list of names: `node[03-05,9],login` is `node03`."""
    depth, end = 0, len(nodes)
    for index, letter in enumerate(nodes):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = index
            break
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes[:end])


def _meeting(
    variables: Mapping[str, str],
    rank: int | None,
    count: int,
    prefix: str,
    *,
    names: tuple[str, str],
    processes: int | None = None,
) -> Place:
    address = f"{prefix}_MASTER_ADDR" if prefix != "MASTER" else "MASTER_ADDR"
    port = address.replace("ADDR", "PORT")
    host = variables.get(address) or variables.get("MASTER_ADDR", "")
    at = _number(variables, port) or _number(variables, "MASTER_PORT") or USUAL_PORT
    missing = [
        name
        for name, value in ((names[1] if prefix == "PET" else names[0], rank), (address, host))
        if value in (None, "")
    ]
    if missing or rank is None:
        message = (
            f"{_shown(variables, names)} say that this is one of {count} machines, {' and '.join(missing)} is missing"
        )
        raise MachineError(f"{message}; {_mend(variables, FOREIGN)}", where="environment")
    if not 0 <= rank < count:
        raise _contradiction(variables, names, f"ranks go from 0 to {count - 1}")
    return Place(rank, count, host, at, " and ".join(names), processes)


def _refuse_loose_ends(variables: Mapping[str, str], *, together: int) -> None:
    """Variables that speak of other processes than those of `together` machines, but not of how to train with them."""
    others = []
    for name in (*OF_A_PROCESS, *OF_TORCHRUN, *OF_KUBERNETES, *OF_MPI):
        if _SIZES.fullmatch(name):
            size = _number(variables, name) or 1
            speaks_of_others = size > 1 and (together == 1 or size % together > 0)
        else:
            rank = _number(variables, name) if _RANKS.fullmatch(name) else None
            speaks_of_others = together == 1 and (rank or 0) > 0
        if speaks_of_others:
            others.append(name)
    if others:
        message = f"{_shown(variables, others)}: another launcher says that this process is one of several"
        lacking = "" if set(others) & set(OF_MPI) else f", without {_missing(variables)}"
        raise MachineError(f"{message}{lacking}; {_mend(variables, FOREIGN)}", where="environment")


def _missing(variables: Mapping[str, str]) -> str:
    names = [name for name in OF_A_PROCESS if not variables.get(name)]
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1] if names else "all that goes with it"


def _mend(variables: Mapping[str, str], names: Iterable[str]) -> str:
    unset = " ".join(f"-u {name}" for name in names if name in variables)
    return f"to train on this machine alone: `env {unset} lorafit train RECIPE`"


def _contradiction(variables: Mapping[str, str], names: Iterable[str], why: str) -> MachineError:
    present = [name for name in names if name in variables]
    return MachineError(
        f"{_shown(variables, present)} contradict each other: {why}; {_mend(variables, present)}", where="environment"
    )


def _shown(variables: Mapping[str, str], names: Iterable[str]) -> str:
    return ", ".join(f"{name}={variables[name]}" for name in names if name in variables)


def _number(variables: Mapping[str, str], name: str) -> int | None:
    """None for a variable that is not set, or empty. Raises MachineError for one that is no number."""
    text = variables.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"-?\d{1,10}", text):
        raise MachineError(f"{name}={text} is not a number; `env -u {name} lorafit train RECIPE`", where="environment")
    return int(text)


def address(text: str) -> tuple[str, int]:
    """Host and port of `HOST`, `HOST:PORT`, `[IPV6]:PORT`. Raises MachineError."""
    found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\s]+)|([0-9a-fA-F:]*:[0-9a-fA-F:]*:[0-9a-fA-F:]*))(?::(\d{1,5}))?", text)
    port = int(found[4]) if found and found[4] else USUAL_PORT
    if not found or not 0 < port < 65536:
        raise MachineError(f'"{text}" is not HOST or HOST:PORT; write 10.0.0.1:29500', where="--main-address")
    return found[1] or found[2] or found[3], port


def settled(told_place: Place | None, *, machines: int | None, rank: int | None, main_address: str | None) -> Place:
    """The place of this machine, by variables, command line and `launch.machines` together. Raises MachineError."""
    known = told_place
    if known is not None and machines is not None and known.count != machines:
        message = f"launch.machines is {machines}, {known.told_by} say {known.count}; write launch.machines: auto"
        raise MachineError(message, where="environment")
    if known is not None and rank is not None and known.rank != rank:
        message = f"--machine-rank is {rank}, {known.told_by} say {known.rank}; leave the option out"
        raise MachineError(message, where="environment")
    count = known.count if known else machines
    given = {"--machine-rank": rank, "--main-address": main_address}
    written = [name for name, value in given.items() if value is not None]
    if count is None and written:
        message = "goes with launch.machines, how many there are; add --set launch.machines=2"
        raise MachineError(message, where=" ".join(written))
    if count is None or count == 1:
        if rank:
            raise MachineError(f"{rank}: there is one machine, 0; write launch.machines", where="--machine-rank")
        return known or ALONE
    if known is None and None in (rank, main_address):
        message = f"{count} machines, but not which of them this is and where they meet"
        mend = "on each type `lorafit train RECIPE --machine-rank I --main-address HOST:PORT`"
        mend = f"{mend}, with I from 0 to {count - 1} and an address of machine 0"
        raise MachineError(f"{message}; {mend}", where="launch.machines")
    place = known or Place(rank or 0, count)
    if not 0 <= place.rank < count:
        raise MachineError(f"{place.rank}: there are {count} machines, 0 to {count - 1}", where="--machine-rank")
    if main_address is None:
        return place
    host, port = address(main_address)
    return Place(place.rank, count, host, port, place.told_by, place.processes)
