"""A group over NCCL, through CuPy's bindings, for bytes in GPU memory.

Written against CuPy 14.2 and NCCL 2.x. This project has never run it on a GPU: its protocol is tested against a
fake of CuPy's communicator that moves bytes between processes, and what touches CUDA is in nccl_device.py.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import DistNetworkError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from bridge.transport.errors import TransportError
from bridge.transport.nccl_device import Device, load_nccl, nccl_type

_POLL_S = 0.0005
# What a peer sent before it left may still be on its way.
_GRACE_S = 0.5
_ABORT_S = 10.0
_FOREVER = timedelta(days=365)

_Result = TypeVar("_Result")
_Launch = Callable[[Any, Sequence[torch.Tensor]], None]


class NcclGroup:
    """A Group (bridge.transport.base) in GPU memory. Operations of a rank run one after the other.

    Tensors on the device are moved as they are; those in host memory (headers, reports, buckets of an offloading
    bridge) through a buffer of their size on the device. NCCL does not notice a peer that dies on the same node:
    the death of rank 0 and a peer's `close` are noticed at once, other deaths by the deadline at the latest.

    A bridge has two groups at work at the same time on one GPU. NCCL's manual warns that communicators may then
    wait for each other; no rank but the bridge is in both of its groups, so there is no circle, only delay.
    """

    def __init__(
        self,
        nccl: Any,
        communicator: Any,
        device: Device,
        stores: tuple[TCPStore, TCPStore],
        *,
        rank: int,
        peers: Sequence[str],
        name: str,
        timeout_s: float,
    ) -> None:
        """Made by `connect`. The second store's connection is only there to wait for departures."""
        self._nccl = nccl
        self._communicator: Any = communicator
        self._device = device
        self._store: TCPStore | None = stores[0]
        self._rank = rank
        self._peers = tuple(peers)
        self._name = name
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._closing = False
        self._departed = ""
        self._waits_for = ""
        _in_thread(lambda: self._watch(stores[1]))

    @property
    def waits_for(self) -> str:
        """The peers from which a call receives right now; empty when there are none."""
        return self._waits_for

    def broadcast(self, t: torch.Tensor, root: int) -> None:
        """Fill `t` on all ranks with the bytes of the root's."""
        sends = root == self._rank
        what = "broadcast to all" if sends else f"broadcast from {self._peers[root]}"
        self._run(
            what, [t], lambda c, b: c.bcast(*_span(b[0]), root, self._device.stream), receives=not sends
        )

    def send(self, t: torch.Tensor, dst: int) -> None:
        """Send the bytes of `t` to rank `dst`, which has to receive as many."""
        what = f"send to {self._peers[dst]}"
        self._run(what, [t], lambda c, b: c.send(*_span(b[0]), dst, self._device.stream), receives=False)

    def recv(self, t: torch.Tensor, src: int) -> None:
        """Fill `t` with bytes from rank `src`."""
        self.recv_each([(t, src)])

    def recv_each(self, parts: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Fill each tensor with bytes from its rank, from all ranks at the same time; no rank comes twice."""
        sources = [src for _, src in parts]
        assert len(set(sources)) == len(sources)

        def launch(communicator: Any, buffers: Sequence[torch.Tensor]) -> None:
            self._nccl.groupStart()
            for buffer, src in zip(buffers, sources, strict=True):
                communicator.recv(*_span(buffer), src, self._device.stream)
            self._nccl.groupEnd()

        self._waits_for = ", ".join(self._peers[src] for src in sources)
        try:
            self._run(f"receive from {self._waits_for}", [t for t, _ in parts], launch, receives=True)
        finally:
            self._waits_for = ""

    def close(self) -> None:
        """Leave; peers that wait for this rank, and an operation of another thread, fail. May be called again."""
        self._closing = True
        store, self._store = self._store, None
        if store is not None:
            # Without rank 0 there is nobody to tell.
            with suppress(RuntimeError, TimeoutError):
                _in_thread(lambda: store.compare_set("left", "", self._peers[self._rank])).result(_GRACE_S)
        with self._turn:
            self._abort()

    def _run(self, what: str, tensors: Sequence[torch.Tensor], launch: _Launch, *, receives: bool) -> None:
        assert all(t.dtype == torch.uint8 and t.is_contiguous() for t in tensors)
        began = time.monotonic()
        with self._turn:
            if self._communicator is None or self._closing:
                raise TransportError(f"{what} in {self._name}: the group is closed; connect anew")
            try:
                self._move(tensors, launch, receives, began + self._timeout_s)
            except (RuntimeError, TimeoutError) as error:
                self._abort()
                raise TransportError(
                    f"{what} in {self._name}, {sum(t.numel() for t in tensors)} bytes, "
                    f"failed after {time.monotonic() - began:.1f} s: {_first_line(error)}"
                ) from error

    def _move(self, tensors: Sequence[torch.Tensor], launch: _Launch, receives: bool, end: float) -> None:
        device, communicator = self._device, self._communicator
        buffers = [t if device.holds(t) else device.empty(t.numel()) for t in tensors]
        staged = [(t, buffer) for t, buffer in zip(tensors, buffers, strict=True) if buffer is not t]
        device.follow()
        if not receives:
            for t, buffer in staged:
                device.copy(t, buffer)
        # The first message between two ranks connects them, and the call then waits for the other one.
        launched = _in_thread(lambda: (device.activate(), launch(communicator, buffers)))
        self._wait(launched.done, end)
        launched.result()
        self._wait(device.mark(), end, communicator.check_async_error)
        if receives and staged:
            # Not earlier: a copy to pageable memory blocks until the stream comes to it.
            for t, buffer in staged:
                device.copy(buffer, t)
            self._wait(device.mark(), end)

    def _wait(
        self, is_done: Callable[[], bool], end: float, check: Callable[[], object] = lambda: None
    ) -> None:
        grace: float | None = None
        while not is_done():
            now = time.monotonic()
            if self._closing:
                raise RuntimeError("closed meanwhile")
            if self._departed:
                grace = grace or now + _GRACE_S
                if now > grace:
                    raise RuntimeError(f"{self._departed} has left the group")
            if now > end:
                raise TimeoutError(f"not done within {self._timeout_s:.0f} s")
            check()
            time.sleep(_POLL_S)

    def _watch(self, store: TCPStore) -> None:
        try:
            store.wait(["left"], _FOREVER)
            self._departed = store.get("left").decode()
        except RuntimeError:
            self._departed = self._peers[0]

    def _abort(self) -> None:
        communicator, self._communicator = self._communicator, None
        if communicator is None:
            return
        end = time.monotonic() + _ABORT_S
        with suppress(RuntimeError, TimeoutError):
            _in_thread(communicator.abort).result(_ABORT_S)
            # Its kernels write to the tensors until they have ended, and the caller may free those.
            ended = self._device.mark()
            while not ended() and time.monotonic() < end:
                time.sleep(_POLL_S)


def connect(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    timeout_s: float,
    peers: Sequence[str] | None = None,
    *,
    device: Device,
    nccl: Any = None,
) -> NcclGroup:
    """A group of `world_size` ranks, each with a GPU of its own; rank 0 must run on `host`, and listens on `port`.

    `peers` are what to call the ranks in messages, `nccl` the module cupy.cuda.nccl or what stands for it.
    Returns when all ranks are there. Raises TransportError when CuPy or NCCL is not installed, the port is
    taken, or a rank is missing after `timeout_s` seconds, which is also the longest that any later call waits.
    """
    nccl = nccl or load_nccl()
    name = f"nccl group at {host}:{port} (rank {rank} of {world_size})"
    end = time.monotonic() + timeout_s
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(host, port, world_size, rank == 0, timeout, wait_for_workers=False)
        watch = TCPStore(host, port, world_size, False, timeout, wait_for_workers=False)
    except DistNetworkError as error:
        hint = "is the port in use? choose another" if rank == 0 else "does rank 0 listen there?"
        raise TransportError(f"{name}: {_first_line(error)}; {hint}") from error

    def create() -> Any:
        device.activate()
        if rank == 0:
            store.set("id", nccl.get_unique_id())
        return nccl.NcclCommunicator(world_size, store.get("id"), rank)

    creating = _in_thread(create)
    try:
        communicator = creating.result(end - time.monotonic())
    except TimeoutError as error:
        # It cannot be interrupted; what comes of it later is of no use.
        creating.add_done_callback(lambda late: late.exception() or late.result().abort())
        raise TransportError(f"{name}: not all ranks came within {timeout_s:.0f} s") from error
    except RuntimeError as error:
        raise TransportError(f"{name}: {_first_line(error)}") from error
    names = peers or [f"rank {rank}" for rank in range(world_size)]
    return NcclGroup(
        nccl, communicator, device, (store, watch), rank=rank, peers=names, name=name, timeout_s=timeout_s
    )


def _span(t: torch.Tensor) -> tuple[int, int, int]:
    """Address, count and type of the elements."""
    number, per_item = nccl_type(t.dtype)
    return t.data_ptr(), t.numel() * per_item, number


def _in_thread(work: Callable[[], _Result]) -> Future[_Result]:
    """Run `work` beside this thread; a process can end while it still runs."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        # Raised again by the reader.
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)

    threading.Thread(target=run, name="nccl", daemon=True).start()
    return future


def _first_line(error: Exception) -> str:
    """The message without the C++ stack that torch appends."""
    return str(error).partition("\n")[0]
