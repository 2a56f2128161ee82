"""Several processes of this machine that train the trials of one sweep side by side, one for each GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from lorafit.launching import launch
from lorafit.launching.signals import PassOn


def run_side_by_side(arguments: Sequence[str], *, count: int, gpus: int) -> list[int]:
    """Run `lorafit ARGUMENTS --worker` that many times and wait; the exit code of each.

    They share the sweep through its storage. A request to stop is passed on to them.
    """
    PassOn().listen()
    command = [sys.executable, "-m", "lorafit", *arguments, "--worker"]
    workers = [
        subprocess.Popen(
            command,
            env=launch.environment_beside(index, count=count, gpus=gpus),
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        for index in range(count)
    ]
    return [worker.wait() for worker in workers]
