"""What every test shares: no network, and one tiny base model."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline"
)
if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each use every core are many times slower than one after another
    os.environ["OMP_NUM_THREADS"] = "1"

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

# A job in the background of a shell ignores these, and every command that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_LOCAL = ("127.", "localhost", "::1", "0.0.0.0")


@pytest.fixture(autouse=True, scope="session")
def offline() -> Iterator[None]:
    """Any connection to another machine fails the test that makes it."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOCAL):  # type: ignore[index]
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    socket.socket.connect = local_only  # type: ignore[method-assign,assignment]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama in float32."""
    from support.tiny import build_base

    return build_base(tmp_path_factory.mktemp("base"))
