"""What the machines of one run tell each other before their processes start: what they are about to do, and on what.

No torch: the process that starts the others is quick.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from lorafit import __version__
from lorafit.errors import MachineError
from lorafit.launching import launch
from lorafit.launching.machines import Link, met
from lorafit.launching.placement import Place
from lorafit.recipe import LoadedRecipe
from lorafit.recipe.rules.run import zero_needs_a_shared_disk
from lorafit.storage.run_dir import RunDir
from lorafit.training.inputs import Inputs
from lorafit.training.must_match import changes, kept_keys
from lorafit.training.start_point import Begin, StartPoint

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")
SHARED_SECONDS = 10.0
"""So long a network disk may take to show what another machine has written."""


@contextmanager
def met_by_recipe(loaded: LoadedRecipe, place: Place, *, begin: Begin, device: str, gpus: int) -> Iterator[Link | None]:
    """The other machines of the run, started with the same recipe, versions and number of processes; None where there
    are none. Raises MachineError."""
    if place.count == 1:
        yield None
        return
    section = loaded.recipe.launch
    for broken in zero_needs_a_shared_disk(
        loaded.recipe.model_copy(update={"launch": section.model_copy(update={"machines": place.count})})
    ):
        raise MachineError(loaded.problem(broken.key, broken.message))
    hello = {
        "recipe": kept_keys(loaded.recipe.model_dump(mode="json")),
        "launch.strategy": section.strategy.rpartition("/")[2],
        "launch.shared_disk": section.shared_disk,
        "processes": launch.processes_asked_for(section, gpus=gpus),
        "device": device,
        "begin": begin,
        "python": platform.python_version().rpartition(".")[0],
        "versions": {package: version(package) for package in PACKAGES} | {"lorafit": __version__},
    }
    with met(place, hello, differences=_differences) as link:
        yield link


def told_by_first(link: Link, loaded: LoadedRecipe) -> tuple[bool, str | None]:
    """On a machine that is not the first: whether the run is finished already, and the date that its rows are of.

    Raises MachineError where the output directory should be that of the first machine and is not.
    """
    (told,) = link.hear().values()
    if loaded.recipe.launch.shared_disk and not told["finished"]:
        _refuse_other_directory(loaded, told["lock"])
    return told["finished"], told["as_of"]


def tell_others(link: Link, loaded: LoadedRecipe, start: StartPoint | None) -> None:
    """The same, told by the first machine; `start` is None for a run that is finished."""
    lock = RunDir(loaded.output_dir()).lock
    as_of = start.as_of if start else None
    link.tell({"finished": start is None, "as_of": as_of, "lock": lock.read_text("utf-8") if start else None})


def ready_to_start(link: Link, inputs: Inputs) -> int:
    """The port where the processes of all machines meet, which have read the same. Raises MachineError."""
    read = {"base model": inputs.base_files.fingerprint(), **inputs.data.parts}
    link.compare(read, differences=_differences)
    if link.is_first:
        port = launch.free_port()
        link.tell({"port": port})
        return port
    (told,) = link.hear().values()
    return int(told["port"])


def _refuse_other_directory(loaded: LoadedRecipe, lock: str) -> None:
    """The lock of the first machine is seen here."""
    path = RunDir(loaded.output_dir()).lock
    until = time.monotonic() + SHARED_SECONDS
    while True:
        try:
            if path.read_text("utf-8") == lock:
                return
        except OSError:
            pass
        if time.monotonic() > until:
            break
        time.sleep(0.5)
    message = f"true, but {path.parent} on this machine is not the directory that machine 0 writes"
    mend = "write false, or choose an output_dir that all machines see"
    raise MachineError(loaded.problem("launch.shared_disk", f"{message}; {mend}"))


def _differences(first: Any, here: Any) -> list[str]:
    return [f"{key.removeprefix('recipe.')} {change} (machine 0 -> there)" for key, change in changes(first, here)]
