"""What `test_two_machines.py` runs on two machines without a shared disk: accelerate's FSDP2, as on GPUs."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from accelerate import Accelerator, PartialState

from support.forked import Crash, CrashAfter
from support.together import STEPS, train_spread_over


def main(directory: Path, base: Path) -> None:
    state = PartialState(cpu=True)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    Accelerator(cpu=True)  # whose state is then told that it is FSDP2
    process = state.process_index
    train_spread_over(directory, base, name="whole", process=process)
    with contextlib.suppress(Crash):
        train_spread_over(directory, base, name="resumed", process=process, watchers=[CrashAfter(STEPS - 1)])
    state.wait_for_everyone()
    train_spread_over(directory, base, name="resumed", process=process, begin="resume")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
