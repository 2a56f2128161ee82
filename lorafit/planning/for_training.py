"""The plan of a run that is about to start on a GPU: made by another process while this one reads the rows."""

from __future__ import annotations

import logging

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from lorafit.errors import LorafitError
from lorafit.launching.child import Child, ChildFailed
from lorafit.planning.ask_planner import Question, begin
from lorafit.planning.gpus import gpu_of_this_machine
from lorafit.planning.plan_result import Plan, gib
from lorafit.preflight import Choice, Machine, free_gpu_bytes
from lorafit.recipe import LoadedRecipe

logger = logging.getLogger(__name__)


class PlanOfRun:
    """What the run is expected to take. Nothing is planned on a CPU, where the limit is not the process's own."""

    def __init__(self, loaded: LoadedRecipe, machine: Machine, *, state: PartialState) -> None:
        self._state = state
        self._is_planned = machine.device == "cuda"
        self._asked: Child | None = None
        if not self._is_planned:
            return
        # Of every process its own GPU: the fullest decides for all.
        free = [free_gpu_bytes([state.local_process_index])]
        if state.num_processes > 1:
            free = gather_object(free)
        if state.is_main_process:
            gpu = gpu_of_this_machine(machine, free_bytes=min(free))
            self._asked = begin(Question(loaded, gpu, state.num_processes, with_advice=False))

    def answer(self) -> Plan | None:
        """The same in every process; None where there is none, with its reason said in a line."""
        if not self._is_planned:
            return None
        plan: Plan | None = None
        if self._asked is not None:
            try:
                plan = self._asked.answer()
                logger.info(f"plan: {plan.line()}")
            except (LorafitError, ChildFailed) as error:
                logger.info(f"no plan: {str(error).strip().splitlines()[-1]}")
        if self._state.num_processes > 1:
            (plan,) = broadcast_object_list([plan])
        if plan is not None and not plan.fits:
            logger.warning(f"by its plan the run does not fit on {plan.gpu}; `lorafit plan` says what to change")
        return plan


def planned_checkpointing(plan: Plan | None) -> Choice[bool] | None:
    """What the plan says of checkpointing."""
    return None if plan is None else Choice(plan.gradient_checkpointing, plan.checkpointing_reason)


def measured_beside(plan: Plan, peak_bytes: int) -> str:
    """`peak memory: 16.60 GiB, planned 16.59 GiB (-0.1 %)`."""
    off = plan.allocated_bytes / peak_bytes - 1
    return f"peak memory: {gib(peak_bytes)}, planned {gib(plan.allocated_bytes)} ({off:+.1%})"
