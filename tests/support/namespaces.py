"""Two machines on this one: network namespaces joined by a pair of virtual interfaces, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.commands import ENVIRONMENT


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def reason_against() -> str:
    """Why no namespaces can be made here; empty where they can."""
    if sys.platform != "linux" or not (shutil.which("ip") and shutil.which("nsenter")):
        return "network namespaces need Linux with iproute2 and nsenter"
    name = f"lorafit-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except (subprocess.SubprocessError, OSError) as error:
        return f"network namespaces cannot be made here: {error}"
    return ""


@dataclass(frozen=True)
class Cluster:
    """Machines 0 and 1."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.213.7.1", "10.213.7.2")

    def start(
        self, machine: int, directory: Path, *words: str, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """`python -m WORDS` there, in a process group of its own; its home, caches and working directory are below
        `directory`."""
        home = {"HOME": str(directory), "LORAFIT_CACHE": str(directory / "cache")}
        return subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.names[machine]}", sys.executable, "-m", *words],
            env=os.environ | ENVIRONMENT | home | dict(variables or {}),
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def cut(self) -> None:
        """Take the cable out."""
        _ip("-n", self.names[0], "link", "set", "eth0", "down")


@contextmanager
def two_machines() -> Iterator[Cluster]:
    """Two namespaces; gone afterwards."""
    pair = (f"lorafit-{os.getpid()}-0", f"lorafit-{os.getpid()}-1")
    cluster = Cluster(pair)
    try:
        for name in pair:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", pair[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", pair[1])
        for name, address in zip(pair, cluster.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield cluster
    finally:
        for name in pair:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)
