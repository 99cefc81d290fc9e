"""The bridge inside a trainer rank: that rank's messages cross a thread, those of the others a group."""

import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch

from bridge.transport.base import Group
from bridge.transport.errors import TransportError

_POLL_S = 0.05


class LoopbackEnd:
    """One of two threads of a process that exchange bytes; each message is copied once, into its place."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._inbox: queue.SimpleQueue[tuple[torch.Tensor, threading.Event]] = queue.SimpleQueue()
        self._peer: LoopbackEnd = self
        self._closed = threading.Event()

    def send(self, t: torch.Tensor, dst: int) -> None:
        """Return when the other end has taken the bytes. Raises TransportError as a group does."""
        taken = threading.Event()
        self._peer._inbox.put((t, taken))
        self._wait("send", lambda: taken.wait(_POLL_S))

    def recv(self, t: torch.Tensor, src: int) -> None:
        """Fill `t` with what the other end sends."""
        offered: list[tuple[torch.Tensor, threading.Event]] = []

        def look() -> bool:
            try:
                offered.append(self._inbox.get(timeout=_POLL_S))
            except queue.Empty:
                return False
            return True

        self._wait("receive", look)
        source, taken = offered[0]
        t.copy_(source)
        taken.set()

    def close(self) -> None:
        """Let both ends fail."""
        self._closed.set()
        self._peer._closed.set()

    def join(self, peer: "LoopbackEnd") -> None:
        """Make this the one end of which `peer` is the other."""
        self._peer = peer

    def _wait(self, what: str, is_done: Callable[[], bool]) -> None:
        end = time.monotonic() + self._timeout_s
        while not is_done():
            if self._closed.is_set():
                raise TransportError(f"{what} within a process: the other end is closed")
            if time.monotonic() > end:
                raise TransportError(f"{what} within a process: nothing came for {self._timeout_s:.0f} s")


def loopback(timeout_s: float) -> tuple[LoopbackEnd, LoopbackEnd]:
    """Both ends: for the bridge and for the rank that hosts it."""
    one, other = LoopbackEnd(timeout_s), LoopbackEnd(timeout_s)
    one.join(other)
    other.join(one)
    return one, other


class HostedGroup:
    """The group of a bridge that a trainer rank hosts: rank 0 is that rank, through the loopback."""

    def __init__(self, local: LoopbackEnd, others: Group | None) -> None:
        """`others` joins the trainer ranks from 1 on, with the bridge as rank 0; None when there are none."""
        self._local = local
        self._others = others
        self._awaits_local = False

    @property
    def waits_for(self) -> str:
        """The peer from which a call receives right now; empty when there is none."""
        if self._awaits_local:
            return "trainer rank 0"
        return "" if self._others is None else self._others.waits_for

    def send(self, t: torch.Tensor, dst: int) -> None:
        """Send to a trainer rank."""
        self._of(dst).send(t, dst)

    def recv(self, t: torch.Tensor, src: int) -> None:
        """Receive from a trainer rank."""
        self._of(src).recv(t, src)

    def recv_each(self, parts: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Receive from several ranks; the one next door is quick."""
        for t, src in parts:
            if src == 0:
                self._awaits_local = True
                self._local.recv(t, src)
        self._awaits_local = False
        remote = [(t, src) for t, src in parts if src]
        if remote:
            assert self._others is not None
            self._others.recv_each(remote)

    def broadcast(self, t: torch.Tensor, root: int) -> None:
        """Not used between trainers and bridge."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the group and close the loopback."""
        self._local.close()
        if self._others is not None:
            self._others.close()

    def _of(self, rank: int) -> LoopbackEnd | Group:
        if rank == 0:
            return self._local
        assert self._others is not None
        return self._others
