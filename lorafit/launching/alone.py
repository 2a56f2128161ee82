"""What a process that belongs to its caller, a notebook's for one, cannot do: become one of several that train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.errors import MachineError
from lorafit.launching import launch

if TYPE_CHECKING:
    from lorafit.recipe import LoadedRecipe


def refuse_several_processes(loaded: LoadedRecipe, *, gpus: int, command: str) -> None:
    """Raises MachineError where training takes several processes or machines, with what to type for them."""
    section, typed = loaded.recipe.launch, f"`lorafit {command} {loaded.path}`"
    if launch.is_worker():
        message = "another launcher has started this process as one of several"
        raise MachineError(f"{message}; start {typed} under it, or call this in a process of its own", where="launch")
    if section.machines not in ("auto", 1):
        message = f"{section.machines} machines are to train together, which takes the command on each: {typed}"
        raise MachineError(loaded.problem("launch.machines", message))
    count = launch.processes_asked_for(section, gpus=gpus)
    if count > 1:
        message = f"{count} processes are to train together, which takes the command: {typed}"
        raise MachineError(loaded.problem("launch.num_processes", f"{message}; or set it to 1"))
    if section.strategy != "ddp":
        message = f"{section.strategy} spreads a model over processes, which takes the command: {typed}"
        raise MachineError(loaded.problem("launch.strategy", f"{message}; or set it to ddp"))
