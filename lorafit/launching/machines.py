"""The link between the machines of one run: they meet, compare what they are about to do, and notice when one is gone.

A connection from each machine to the first, one JSON object a line, a blank line every two seconds as a sign of life.
torch's own group would notice a machine that was cut off after half an hour. No torch: it lives in the process that
starts the others, from before the data is read to the end, also across `exec`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from lorafit.errors import LorafitError, MachineError
from lorafit.launching.placement import Place

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 60.0
"""An address at which nobody answers for so long is wrong, or the first machine was not started."""
GATHER_SECONDS = 600.0
"""So long the first machine waits for the others: images are pulled, commands typed."""
BEAT_SECONDS = 2.0
SILENCE_SECONDS = 18.0
"""A machine that gives no sign of life for so long is gone; its processes are ended at once, so that all is over within
half a minute."""
LONGEST_LINE = 2**20
_AGAIN = "with --resume on all of them the run goes on"


@dataclass
class Peer:
    """The machine at the other end of a connection."""

    rank: int
    name: str
    connection: socket.socket
    unread: bytes = b""
    heard: float = field(default_factory=time.monotonic)
    is_done: bool = False
    """Whether it has said goodbye, all being well."""
    messages: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)

    def __str__(self) -> str:
        return f"machine {self.rank} ({self.name})"


class Link:
    """This machine's connections: of the first to each other one, of each other one to the first."""

    def __init__(self, place: Place, peers: list[Peer]) -> None:
        self.place = place
        self.lost: MachineError | None = None
        """Why the run cannot go on; set once."""
        self._peers = {peer.rank: peer for peer in peers}
        self._writing = threading.Lock()
        self.is_over = threading.Event()
        """Whether nothing is sent or heard any more."""
        self._is_closed = False
        self._is_settled = False
        """Whether all machines know why the run does not begin."""
        self._on_lost: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._telling: threading.Thread | None = None
        """Calls `_on_lost`."""
        for peer in peers:
            peer.connection.settimeout(BEAT_SECONDS)

    @property
    def is_first(self) -> bool:
        """Whether this machine is the one whose first process speaks and writes."""
        return self.place.rank == 0

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Give signs of life from now on, and call `on_lost`, in another thread, when a machine gives none any more."""
        self._on_lost = on_lost
        self._thread.start()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send to every machine at the other end."""
        for peer in self._peers.values():
            self._send(peer, json.dumps(message).encode())

    def hear(self) -> dict[int, dict[str, Any]]:
        """The next message of each, by its rank. Raises MachineError when one is gone."""
        return {rank: self._next(peer) for rank, peer in self._peers.items()}

    def compare(self, facts: Mapping[str, Any], *, differences: Callable[[Any, Any], list[str]]) -> None:
        """All machines have the same `facts`. Raises MachineError in all of them, naming machine and difference."""
        if not self.is_first:
            self.tell({"facts": facts})
            (answer,) = self.hear().values()
            wrong = answer["differ"]
        else:
            wrong = []
            for rank, message in self.hear().items():
                there = json.loads(json.dumps(message["facts"]))
                here = json.loads(json.dumps(facts))
                wrong += [f"{self._peers[rank]}: {text}" for text in differences(here, there)]
            self.tell({"differ": wrong})
        if wrong:
            self._is_settled = True
            mend = "all machines need the same recipe, rows, base and versions"
            raise MachineError("\n".join(f"{text}; {mend}" for text in wrong), where="machines")

    def handed_over(self) -> str:
        """What `taken_over` needs to go on with these connections after `exec`; nothing is sent or heard meanwhile."""
        self._stop()
        if self.lost is not None:
            raise self.lost
        for peer in self._peers.values():
            peer.connection.set_inheritable(True)
        peers = [
            [peer.rank, peer.name, peer.connection.fileno(), peer.unread.decode()] for peer in self._peers.values()
        ]
        return json.dumps({"rank": self.place.rank, "count": self.place.count, "peers": peers})

    def close(self, code: int, *, said: str = "") -> None:
        """Say goodbye, once: what this machine ended with, and why."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stop()
        for peer in self._peers.values():
            if self.lost is not None and not said:
                said = str(self.lost)
            self._send(peer, json.dumps({"ended": 0 if self._is_settled else code, "said": said}).encode())
            with suppress(OSError):
                peer.connection.shutdown(socket.SHUT_WR)
            peer.connection.close()

    def interface(self) -> str | None:
        """The network interface by which the machines reach each other."""
        here = {peer.connection.getsockname()[0].removeprefix("::ffff:") for peer in self._peers.values()}
        for name, addresses in psutil.net_if_addrs().items():
            if here & {one.address.partition("%")[0] for one in addresses}:
                return name
        return None

    def _stop(self) -> None:
        self.is_over.set()
        if threading.current_thread() is self._thread:
            return
        try:
            self._end_threads()
        except KeyboardInterrupt:
            if self.lost is None:
                raise
            self._end_threads()  # it was the one that a lost machine sends, after its loss had been noticed here

    def _end_threads(self) -> None:
        if self._thread.is_alive():
            self._thread.join()
        if self._telling is not None:
            self._telling.join()
            time.sleep(0)  # where an interrupt that it has sent is raised

    def _next(self, peer: Peer) -> dict[str, Any]:
        while True:
            with suppress(queue.Empty):  # in short turns, so that a request to stop is heard
                return peer.messages.get(timeout=0.2)
            if self.lost is not None:
                raise self.lost

    def _send(self, peer: Peer, line: bytes) -> None:
        with self._writing, suppress(OSError):  # of what cannot be sent the reader hears
            peer.connection.sendall(line + b"\n")

    def _listen(self) -> None:
        """Hear and be heard until it is over."""
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                peer.heard = time.monotonic()
                selector.register(peer.connection, selectors.EVENT_READ, peer)
                self._take(peer)  # what was read before `exec`
            due = time.monotonic()
            while not self.is_over.is_set() and self.lost is None:
                if (now := time.monotonic()) >= due:
                    for peer in self._peers.values():
                        self._send(peer, b"")
                    due = now + BEAT_SECONDS
                for key, _ in selector.select(timeout=0.2):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                for peer in self._peers.values():
                    if not peer.is_done and time.monotonic() - peer.heard > SILENCE_SECONDS:
                        silent = f"gives no sign of life any more ({SILENCE_SECONDS:.0f} s): dead or cut off"
                        self._is_lost(f"{peer} {silent}; {_AGAIN}")
        if self.lost is not None and self._on_lost is not None and not self.is_over.is_set():
            self._telling = threading.Thread(target=self._on_lost, daemon=True)
            self._telling.start()

    def _read(self, peer: Peer) -> bool:
        """Whether there may be more."""
        try:
            data = peer.connection.recv(2**16)
        except TimeoutError:
            return True
        except OSError:
            data = b""
        if not data:
            if not peer.is_done:
                self._is_lost(f"{peer} has ended without a word (killed?); {_AGAIN}")
            return False
        peer.heard = time.monotonic()
        peer.unread += data
        self._take(peer)
        return True

    def _take(self, peer: Peer) -> None:
        *lines, peer.unread = peer.unread.split(b"\n")
        for line in filter(None, lines):
            message = json.loads(line)
            if "ended" not in message:
                peer.messages.put(message)
            elif message["ended"] == 0:
                peer.is_done = True
            else:
                peer.is_done = True
                why = f": {message['said']}" if message["said"] else f" with exit code {message['ended']}; it says why"
                self._is_lost(f"{peer} has ended{why}", code=message["ended"])

    def _is_lost(self, message: str, *, code: int = 0) -> None:
        if self.lost is None:
            self.lost = LostMachine(message, code=code)


class LostMachine(MachineError):
    """Another machine has ended, or cannot be reached any more."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message, where="machines")
        self.code = code
        """What it ended with; 0 where it could not say."""


def taken_over(handed: str) -> Link:
    """The link that another program had before it became this one."""
    told = json.loads(handed)
    peers = []
    for rank, name, number, unread in told["peers"]:
        os.set_inheritable(number, False)
        peers.append(Peer(rank, name, socket.socket(fileno=number), unread.encode()))
    return Link(Place(told["rank"], told["count"]), peers)


@contextmanager
def met(place: Place, hello: Mapping[str, Any], *, differences: Callable[[Any, Any], list[str]]) -> Iterator[Link]:
    """The machines of a run, all there, of one mind about `hello`; how this one ends is told to the others.

    Raises MachineError for an address that does not answer, for a machine that does not come, and for differences.
    """
    link = _first(place) if place.rank == 0 else _other(place)
    try:
        link.watch(_interrupt_main)
        link.compare(hello, differences=differences)
        yield link
    except LorafitError as error:
        link.close(error.exit_code, said=str(error).splitlines()[0])
        raise
    except KeyboardInterrupt:
        if link.lost is not None:
            link.close(link.lost.exit_code)
            raise link.lost from None
        link.close(75, said="stopped on request")
        raise
    except BaseException:
        link.close(1)
        raise
    link.close(0)


def _interrupt_main() -> None:
    """Ctrl-C, as this process hears it."""
    os.kill(os.getpid(), signal.SIGINT)


def _first(place: Place) -> Link:
    """Wait for all others at the port of this machine."""
    began = time.monotonic()
    with ExitStack() as undo:
        server = undo.enter_context(_listening(place.port))
        peers: dict[int, Peer] = {}
        undo.callback(_close_all, peers)
        told = due = began
        while len(peers) < place.count - 1:
            if time.monotonic() >= due:  # to those that are there: they listen for signs of life already
                for early in peers.values():
                    with suppress(OSError):
                        early.connection.sendall(b"\n")
                due = time.monotonic() + BEAT_SECONDS
            missing = [rank for rank in range(1, place.count) if rank not in peers]
            named = f"machine{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {place.count}"
            if time.monotonic() - began > GATHER_SECONDS:
                message = (
                    f"{named} did not come within {GATHER_SECONDS / 60:.0f} minutes; was it started with this address?"
                )
                raise MachineError(message, where=f"{place.host}:{place.port}")
            if time.monotonic() - told > 10:
                logger.info(f"waiting for {named} at port {place.port}")
                told = time.monotonic() + 20
            with suppress(TimeoutError):
                connection, _ = server.accept()
                if peer := _welcomed(connection, place, there=peers):
                    peers[peer.rank] = peer
        server.close()
        undo.pop_all()
        return Link(place, [peers[rank] for rank in sorted(peers)])


def _close_all(peers: Mapping[int, Peer]) -> None:
    for peer in peers.values():
        peer.connection.close()


def _listening(port: int) -> socket.socket:
    try:
        server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} is in use on this machine; name another with --main-address HOST:PORT on all"
            raise MachineError(message, where="--main-address") from None
        try:
            server = socket.create_server(("", port))
        except OSError as without_ipv6:
            raise MachineError(f"{without_ipv6.strerror}: port {port}", where="--main-address") from None
    server.settimeout(0.5)
    return server


def _welcomed(connection: socket.socket, place: Place, *, there: Mapping[int, Peer]) -> Peer | None:
    """The machine that has connected; None for a stranger, or for one that is told why it cannot take part."""
    line = _line(connection, seconds=5)
    try:
        hello = json.loads(line)
        rank, count, name = int(hello["machine"]), int(hello["of"]), str(hello["name"])
    except (ValueError, KeyError, TypeError):
        connection.close()
        return None
    wrong = ""
    if count != place.count:
        wrong = f"is one of {count} machines there, one of {place.count} on machine 0"
    elif rank in there or rank == 0:
        whose = there[rank].name if rank in there else socket.gethostname()
        wrong = f"machine {rank} is {whose} already; give each machine its own --machine-rank"
    answer = {"refused": wrong} if wrong else {"name": socket.gethostname()}
    with suppress(OSError):
        connection.sendall(json.dumps(answer).encode() + b"\n")
    if wrong:
        connection.close()
        return None
    return Peer(rank, name, connection)


def _other(place: Place) -> Link:
    """Find the first machine at its address."""
    where = f"{place.host}:{place.port}"
    began, reason = time.monotonic(), "no answer"
    while time.monotonic() - began < ANSWER_SECONDS:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=5)
            hello = {"machine": place.rank, "of": place.count, "name": socket.gethostname()}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            answer = json.loads(_line(connection, seconds=5) or b"{}")
        except OSError as error:
            reason = error.strerror or "no answer"
        except ValueError:
            reason = "something else answers"
        else:
            if refused := answer.get("refused"):
                raise MachineError(refused, where=where)
            if "name" in answer:
                return Link(place, [Peer(0, answer["name"], connection)])
            reason = "something else answers"
            connection.close()
        time.sleep(0.5)
    message = (
        f"the first machine does not answer within {ANSWER_SECONDS:.0f} s ({reason}); start it, or correct the address"
    )
    raise MachineError(message, where=where)


def _line(connection: socket.socket, *, seconds: float) -> bytes:
    """One line, however slowly it comes; nothing where it does not end in time, or is too long."""
    connection.settimeout(seconds)
    read, until = b"", time.monotonic() + seconds
    with suppress(OSError):
        while time.monotonic() < until and len(read) < LONGEST_LINE:
            byte = connection.recv(1)
            if not byte or byte == b"\n":
                break
            read += byte
    return read
