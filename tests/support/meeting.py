"""One machine of some that meet, for `test_machines.py`: its place, its facts and what it then does as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lorafit.errors import LorafitError, StopRequested
from lorafit.launching import machines
from lorafit.launching.machines import met, taken_over
from lorafit.launching.placement import Place
from lorafit.launching.signals import end_after_lost_machine
from lorafit.lines import heard


def differences(first: Any, here: Any) -> list[str]:
    return [f"{key} {first[key]} -> {here[key]}" for key in first if first[key] != here[key]]


def main(given: dict[str, Any]) -> None:
    for name, value in given.get("settings", {}).items():
        setattr(machines, name, value)
    place = Place(given["rank"], given["count"], "127.0.0.1", given["port"])
    with (
        heard(lambda line: print(line, flush=True)),
        met(place, given["facts"], differences=differences) as link,
    ):
        print("met", flush=True)
        match given.get("then"):
            case "again" | "launches" as then:
                os.execv(sys.executable, [sys.executable, __file__, then, link.handed_over()])
            case "killed":
                time.sleep(0.5)  # when all have met
                os._exit(9)
            case "silent":
                link.is_over.set()  # no signs of life any more, the connection stays
                time.sleep(60)
            case "fails":
                time.sleep(0.5)  # the same
                raise StopRequested("stopped at 15/20")
            case "waits":
                link.hear()
        link.compare(given["facts"], differences=differences)
        print("compared again", flush=True)


def launches(handed: str) -> None:
    """After `exec`, as the process that starts the others, which wait for longer than a test does."""
    link = taken_over(handed)
    with tempfile.TemporaryDirectory() as directory:
        sign = Path(directory) / "lost"
        link.watch(lambda: end_after_lost_machine(sign, lambda: link.lost, is_over=link.is_over))
        code = subprocess.run(["sleep", "60"]).returncode
        link.close(4)
        print(f"ended by {-code}: {link.lost}; told by a file: {sign.exists()}", flush=True)


def again(handed: str) -> None:
    """After `exec`."""
    link = taken_over(handed)
    link.watch(lambda: None)
    link.compare({"seed": 1}, differences=differences)
    print("compared again", flush=True)
    link.close(0)


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["again", handed]:
                again(handed)
            case ["launches", handed]:
                launches(handed)
            case [given]:
                main(json.loads(given))
    except LorafitError as error:
        print(error)
        sys.exit(error.exit_code)
