"""The processes that train together: started and watched here, and checked in each of them to be what was asked for."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import broadcast_object_list
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from lorafit.errors import LorafitError, MachineError, StopRequested
from lorafit.launching import launch
from lorafit.launching.machines import Link
from lorafit.launching.signals import ENDED_WITH_ANOTHER, PassOn, done_elsewhere
from lorafit.recipe import LoadedRecipe
from lorafit.recipe.rules.adapter import adapter_can_be_sharded, quantized_weights_can_be_sharded
from lorafit.recipe.rules.run import halving_needs_whole_gradients, optimizer_takes_sharded_weights
from lorafit.recipe.rules.tokens import rows_of_added_tokens_can_be_trained
from lorafit.storage.stage import scratch

T = TypeVar("T")

_STRATEGIES = {"FSDP2": "fsdp2", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def run_processes(arguments: Sequence[str], *, requests: PassOn, link: Link | None = None) -> int:
    """`accelerate launch ARGUMENTS`: start the processes and wait for them; the exit code of the one that failed, or 0.

    A process reports its own error. Raises MachineError for one that was killed, which could not, and for a machine
    that is gone, and StopRequested when all were told to stop before they could say so. All have ended when this
    returns.
    """
    logging.disable(logging.ERROR)  # the launcher's own account of a failure, a page long
    launch.name_this_launcher()
    with scratch() as error_files:
        settings = launch_command_parser().parse_args(["--log_dir", str(error_files), *arguments])
        # torch's launcher ends the processes 30 seconds after a signal; ours lets them save.
        settings.signals_to_handle = "SIGQUIT"
        try:
            launch_command(settings)
        except ChildFailedError as error:
            if link is not None and link.lost is not None and not _has_own_cause(error.failures):
                raise link.lost from None
            return _exit_code_of(error.failures, was_asked=requests.heard is not None)
        except (SignalException, KeyboardInterrupt) as error:
            raise StopRequested("stopped on request; all processes were ended", where="launch") from error
        except (DistError, ConnectionError, TimeoutError) as error:  # while the machines' processes come together
            lost = link.lost if link is not None else None
            raise lost or MachineError(str(error).splitlines()[0], where="launch") from error
    return 0


def _has_own_cause(failures: dict[int, ProcessFailure]) -> bool:
    """Whether a process failed of something else than that others were gone, and has said so."""
    others = (-signal.SIGTERM, -signal.SIGKILL, ENDED_WITH_ANOTHER)
    return any(failure.exitcode not in others for failure in failures.values())


def _exit_code_of(failures: dict[int, ProcessFailure], *, was_asked: bool) -> int:
    """What the process that failed first ended with. Raises MachineError when it was killed.

    After a request one that is still starting may be cut off by another that has left already.
    """
    # The others are told to end, and killed after 30 seconds if they do not.
    first = min(failure.timestamp for failure in failures.values())
    codes = {rank: failure.exitcode for rank, failure in failures.items() if failure.timestamp < first + 15}
    with_another = (-signal.SIGTERM, ENDED_WITH_ANOTHER)
    rank = min(codes, key=lambda rank: (codes[rank] in with_another, codes[rank] > 0, codes[rank] == 1))
    if codes[rank] in with_another or (was_asked and codes[rank] < 0):
        raise StopRequested("stopped on request before the first step; nothing was saved", where="launch")
    if codes[rank] >= 0:
        return codes[rank]
    name = signal.Signals(-codes[rank]).name
    mend = " (out of memory?)" if name == "SIGKILL" else "; see the messages above"
    raise MachineError(f"process {rank} was killed by {name}{mend}; the others were ended", where="launch")


def join_processes(loaded: LoadedRecipe, *, device: str, gpus: int) -> PartialState:
    """Meet the other processes of this run. Raises MachineError when they are not as many as were asked for."""
    # The trainer finds the group there and leaves it, with its own default for the longest wait.
    seconds = loaded.recipe.training.extra.get("ddp_timeout", 1800)
    timeout = {"timeout": timedelta(seconds=seconds)}
    if not launch.is_worker():
        return PartialState(cpu=device == "cpu")
    here = launch.processes_here()
    state = done_elsewhere(lambda: PartialState(cpu=device == "cpu", **timeout))
    launch.name_processes_here(here)
    if state.device.type == "cuda" and state.device.index is not None:
        torch.cuda.set_device(state.device)  # which each thread has its own of
    _refuse_other_numbers(loaded, state, gpus=gpus)
    return state


def _refuse_other_numbers(loaded: LoadedRecipe, state: PartialState, *, gpus: int) -> None:
    section, here = loaded.recipe.launch, launch.processes_here()
    machines = state.num_processes // here
    is_own_file = Path(section.strategy).is_absolute()  # accelerate counts the processes of all machines
    asked = launch.processes_asked_for(section, gpus=gpus)
    started = state.num_processes if is_own_file and section.num_processes != "auto" else here
    by = "RANK and WORLD_SIZE in the environment say so; without them start it with `lorafit train`"
    if started != asked:
        message = f"{asked} processes were asked for, {started} started: {by}"
        raise MachineError(loaded.problem("launch.num_processes", message))
    if section.machines not in ("auto", machines):
        message = f"{section.machines} machines were asked for, {machines} started: {by}"
        raise MachineError(loaded.problem("launch.machines", message))


def by_first(work: Callable[[], T]) -> T:
    """What `work` comes to in the first process, in all of them; it also raises in all of them."""
    state = PartialState()
    if state.num_processes == 1:
        return work()
    found: list[T | LorafitError | None] = [None]
    if state.is_main_process:
        try:
            found = [work()]
        except LorafitError as error:
            found = [error]
    (answer,) = broadcast_object_list(found)
    if isinstance(answer, LorafitError):
        raise answer
    return answer


def leave_processes() -> None:
    """Part from the other processes; NCCL complains on stderr of those that just end."""
    if launch.is_worker():
        PartialState().destroy_process_group()


def refuse_other_distribution(loaded: LoadedRecipe, accelerator: Accelerator, *, mixed_precision: str) -> None:
    """The model is spread as was asked: by the recipe, or, where it does not say, by the accelerate file.

    accelerate falls back to plain data parallel without a word where a strategy does not work (FSDP without a GPU).
    Raises MachineError.
    """
    if not launch.is_worker():
        return
    section = loaded.recipe.launch
    kinds = {"ddp": "data parallel", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
    is_written = "strategy" in section.model_fields_set and section.strategy in kinds
    asked = kinds[section.strategy] if is_written else launch.sharding_asked_for()
    got = distribution(accelerator)
    if not got.startswith(asked):
        message = (
            f"{asked} was asked for, {got} was started on {accelerator.device.type}; start it with `lorafit train`"
        )
        raise MachineError(loaded.problem("launch.strategy", message))
    if got == "FSDP1":
        message = "FSDP 1 melts the adapter into the weights it shards; write fsdp_version: 2 in the accelerate file"
        raise MachineError(loaded.problem("launch.strategy", message))
    if got == "FSDP2" and accelerator.state.fsdp_plugin.state_dict_type.name != "FULL_STATE_DICT":
        message = "checkpoints would hold a part per process; write fsdp_state_dict_type: FULL_STATE_DICT in that file"
        raise MachineError(loaded.problem("launch.strategy", message))
    # Started by hand the recipe need not name the strategy, and its rules have not yet spoken.
    started = section.model_copy(update={"strategy": _STRATEGIES.get(got, "ddp")})
    as_started = loaded.recipe.model_copy(update={"launch": started})
    rules = (
        quantized_weights_can_be_sharded,
        adapter_can_be_sharded,
        halving_needs_whole_gradients,
        optimizer_takes_sharded_weights,
        rows_of_added_tokens_can_be_trained,
    )
    broken = [problem for rule in rules for problem in rule(as_started)]
    if broken:
        raise MachineError(loaded.problem(rule.key, rule.message) for rule in broken)
    if accelerator.mixed_precision != mixed_precision:
        message = (
            f"the accelerate file sets mixed_precision {accelerator.mixed_precision}, the recipe {mixed_precision}"
        )
        raise MachineError(loaded.problem("launch.strategy", f'{message}; write mixed_precision: "no" there'))


def distribution(accelerator: Accelerator) -> str:
    """How the model is spread over the processes: `data parallel`, `FSDP2`, `ZeRO-3` ..."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        return "FSDP2" if accelerator.is_fsdp2 else "FSDP1"
    if kind == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "data parallel" if kind in DATA_PARALLEL else str(kind.value)
