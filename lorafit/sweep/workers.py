"""Several processes of this machine that train the trials of one sweep side by side, one for each GPU."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.launching import launch
from lorafit.launching.child import started
from lorafit.launching.signals import PassOn


def run_side_by_side(arguments: Sequence[str], *, count: int, gpus: int) -> list[int]:
    """Run `lorafit ARGUMENTS --worker` that many times and wait; the exit code of each.

    They share the sweep through its storage. A request to stop is passed on to them.
    """
    PassOn().listen()
    workers = [
        started(
            ["-m", "lorafit", *arguments, "--worker"],
            environment=launch.environment_beside(index, count=count, gpus=gpus),
            own_session=True,
        )
        for index in range(count)
    ]
    return [worker.wait() for worker in workers]
