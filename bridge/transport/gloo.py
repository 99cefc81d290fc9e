"""A gloo group of our own, beside torch's default one."""

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from bridge.transport.errors import TransportError

# Below the ports of outgoing connections, above those of Ray's workers.
_FIRST_PORT, _PORTS, _PORT_TRIES = 20_000, 10_000, 50


class GlooGroup:
    """A Group (bridge.transport.base) in host memory."""

    def __init__(
        self, store: TCPStore, process_group: dist.ProcessGroupGloo, name: str, peers: Sequence[str]
    ) -> None:
        self._store: TCPStore | None = store
        self._process_group: dist.ProcessGroupGloo | None = process_group
        self._name = name
        self._peers = tuple(peers)
        self._waits_for = ""

    @property
    def waits_for(self) -> str:
        """The peer from which a call receives right now; empty when there is none."""
        return self._waits_for

    def broadcast(self, t: torch.Tensor, root: int) -> None:
        """Fill `t` on all ranks with the bytes of the root's."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        what = "broadcast to all" if root == self._rank else f"broadcast from {self._peers[root]}"
        self._run(what, [t], lambda group: [group.broadcast([t], options)])

    def send(self, t: torch.Tensor, dst: int) -> None:
        """Send the bytes of `t` to rank `dst`, which has to receive as many."""
        self._run(f"send to {self._peers[dst]}", [t], lambda group: [group.send([t], dst, 0)])

    def recv(self, t: torch.Tensor, src: int) -> None:
        """Fill `t` with bytes from rank `src`."""
        self.recv_each([(t, src)])

    def recv_each(self, parts: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Fill each tensor with bytes from its rank, from all ranks at the same time."""
        what = f"receive from {', '.join(self._peers[src] for _, src in parts)}"

        def start(group: Any) -> list[Any]:
            return [group.recv([t], src, 0) for t, src in parts]

        self._run(what, [t for t, _ in parts], start, [self._peers[src] for _, src in parts])

    def close(self) -> None:
        """Close the sockets; peers that wait for this rank fail at once. May be called again."""
        self._process_group = None
        self._store = None

    @property
    def _rank(self) -> int:
        return self._process_group.rank() if self._process_group is not None else -1

    def _run(
        self,
        what: str,
        tensors: Sequence[torch.Tensor],
        start: Callable[[Any], list[Any]],
        sources: Sequence[str] = ("",),
    ) -> None:
        for t in tensors:
            assert t.dtype == torch.uint8
            assert t.is_contiguous()
        if self._process_group is None:
            raise TransportError(f"{what} in {self._name}: the group is closed; connect anew")
        began = time.monotonic()
        try:
            for source, work in zip(sources, start(self._process_group), strict=True):
                if source:
                    self._waits_for = source
                work.wait()
        except RuntimeError as error:
            # Its traceback would keep the process group, and so the sockets, after `close`.
            raise TransportError(
                f"{what} in {self._name}, {sum(t.numel() for t in tensors)} bytes, "
                f"failed after {time.monotonic() - began:.1f} s: {_first_line(error)}"
            ) from error.with_traceback(None)
        finally:
            # And so would this name, through the traceback of the TransportError.
            work = None
            if sources[0]:
                self._waits_for = ""


def connect(
    host: str, port: int, rank: int, world_size: int, timeout_s: float, peers: Sequence[str] | None = None
) -> GlooGroup:
    """A group of `world_size` ranks; rank 0 must run on `host`, and listens on `port`.

    `peers` are what to call the ranks in messages. Returns when all ranks are there. Raises TransportError when
    the port is taken or a rank is missing after `timeout_s` seconds, which is also the longest any later call
    waits.
    """
    name = f"gloo group at {host}:{port} (rank {rank} of {world_size})"
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(host, port, world_size, rank == 0, timeout, wait_for_workers=False)
    except dist.DistNetworkError as error:
        hint = "is the port in use? choose another" if rank == 0 else "does rank 0 listen there?"
        raise TransportError(f"{name}: {_first_line(error)}; {hint}") from error
    # Any: torch's type stubs know neither this constructor nor the name of its options.
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timeout
    options._devices = [gloo.create_device(hostname=_local_address(host, port), lazy_init=False)]
    try:
        process_group = gloo(PrefixStore("gloo/", store), rank, world_size, options)
    except RuntimeError as error:
        raise TransportError(
            f"{name}: not all ranks came within {timeout_s:.0f} s: {_first_line(error)}"
        ) from error
    return GlooGroup(store, process_group, name, peers or [f"rank {rank}" for rank in range(world_size)])


def free_port(host: str) -> int:
    """A port that nothing listened on at `host`, an address of this machine, a moment ago.

    It is not one that systems give to outgoing connections, which could take it before somebody listens on it.
    """
    for _ in range(_PORT_TRIES):
        port = _FIRST_PORT + secrets.randbelow(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _local_address(host: str, port: int) -> str:
    """The address of this machine on the route to `host`. No packet is sent."""
    info = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(info[0], socket.SOCK_DGRAM) as probe:
        probe.connect(info[4])
        return probe.getsockname()[0]


def _first_line(error: Exception) -> str:
    """The message without the C++ stack that torch appends."""
    return str(error).partition("\n")[0]
