"""A stand-in for CuPy's NCCL module, CUDA streams and GPU memory, in host memory and between real processes.

It is as strict as a GPU where that catches mistakes: work on a stream happens later, in order, on a thread; a
message moves only when both ends are there with the same kind, type and count; addresses outside of "device"
memory fail; and a peer's death goes unnoticed.
"""

import ctypes
import pickle
import queue
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch

HOST = "127.0.0.1"
_WAIT_S = 60.0
_ID_BYTES = 128
_ITEM_BYTES = {0: 1, 1: 1, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}
_LABEL = struct.Struct("<8siq")


class HostStream:
    """Work in order, each piece of it a moment after it was given."""

    def __init__(self, streams: dict[int, "HostStream"], delay_s: float = 0.002) -> None:
        self.address = 1000 + len(streams)
        self._delay_s = delay_s
        self._work: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        streams[self.address] = self
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, work: Callable[[], object]) -> None:
        """Do it later."""
        self._work.put(work)

    def _run(self) -> None:
        while True:
            work = self._work.get()
            time.sleep(self._delay_s)
            work()


class HostDevice:
    """bridge.transport.nccl_device.Device; one for each rank, also where several are in a process."""

    streams: dict[int, HostStream] = {}  # noqa: RUF012
    memory: dict[int, int] = {}  # noqa: RUF012
    """Bytes by address, of all devices."""

    def __init__(self) -> None:
        self._own = HostStream(self.streams)
        self.current = HostStream(self.streams)
        """Where tests produce."""

    @property
    def stream(self) -> int:
        return self._own.address

    def activate(self) -> None:
        pass

    def holds(self, t: torch.Tensor) -> bool:
        return self.reaches(t.data_ptr(), t.numel())

    def empty(self, nbytes: int) -> torch.Tensor:
        t = torch.full((nbytes,), 0xEE, dtype=torch.uint8)
        self.memory[t.data_ptr()] = nbytes
        weakref.finalize(t, self.memory.pop, t.data_ptr())
        return t

    def filled(self, *values: int) -> torch.Tensor:
        """A tensor in device memory."""
        return self.empty(len(values)).copy_(torch.tensor(values, dtype=torch.uint8))

    def follow(self) -> None:
        event = threading.Event()
        self.current.put(event.set)
        self._own.put(event.wait)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        # By address, as the hardware: it does not keep the buffer on the device.
        to, start, nbytes = target.data_ptr(), source.data_ptr(), source.numel()

        def work() -> None:
            if self.reaches(to, nbytes) or self.reaches(start, nbytes):
                ctypes.memmove(to, start, nbytes)

        self._own.put(work)

    def mark(self) -> Callable[[], bool]:
        event = threading.Event()
        self._own.put(event.set)
        return event.is_set

    @classmethod
    def reaches(cls, address: int, nbytes: int) -> bool:
        """Whether all of it is in device memory."""
        return any(
            start <= address and address + nbytes <= start + size for start, size in list(cls.memory.items())
        )


class FakeNccl:
    """The module cupy.cuda.nccl. `calls` are those of all communicators that it made, in order."""

    available = True

    def __init__(self, *, launch_blocks: bool = False, notices_death: bool = False) -> None:
        """`launch_blocks`: calls wait for the peer, as NCCL's first message between two ranks does."""
        self.launch_blocks = launch_blocks
        self.notices_death = notices_death
        self.calls: list[tuple[Any, ...]] = []
        self.communicators: list[FakeCommunicator] = []
        self.grouped: list[tuple[FakeCommunicator, int, Callable[[], None]]] | None = None
        self._grouping = 0
        self._root: socket.socket | None = None
        self.unique_id = b""

    def get_unique_id(self) -> bytes:
        self._root = socket.create_server((HOST, 0))
        self.unique_id = self._root.getsockname()[1].to_bytes(4, "little").ljust(_ID_BYTES, b"\0")
        return self.unique_id

    def NcclCommunicator(self, ndev: int, commId: bytes, rank: int) -> "FakeCommunicator":  # noqa: N802
        assert len(commId) == _ID_BYTES
        links = _mesh(ndev, int.from_bytes(commId[:4], "little"), rank, self._root)
        self.communicators.append(FakeCommunicator(self, links, ndev, rank))
        return self.communicators[-1]

    def groupStart(self) -> None:  # noqa: N802
        assert self.grouped is None
        self.calls.append(("groupStart",))
        self.grouped = []
        self._grouping = threading.get_ident()

    def groupEnd(self) -> None:  # noqa: N802
        assert self.grouped is not None
        assert self._grouping == threading.get_ident()
        self.calls.append(("groupEnd",))
        grouped, self.grouped = self.grouped, None
        if grouped:
            grouped[0][0].start(grouped[0][1], [work for _, _, work in grouped])


class FakeCommunicator:
    """cupy.cuda.nccl.NcclCommunicator."""

    def __init__(self, nccl: FakeNccl, links: dict[int, socket.socket], ndev: int, rank: int) -> None:
        self._nccl = nccl
        self._links = links
        self._size = ndev
        self._rank = rank
        self._error: str | None = None
        self.aborted = threading.Event()
        self.running = 0

    def rank_id(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def check_async_error(self) -> None:
        if self._error is not None:
            raise RuntimeError(self._error)

    def abort(self) -> None:
        self.aborted.set()
        for link in self._links.values():
            _shut(link)

    destroy = abort

    def bcast(self, buff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self._nccl.calls.append(("bcast", count, datatype, root, stream))

        def work() -> None:
            if root != self._rank:
                self._take(b"bcast", buff, count, datatype, root)
                return
            for peer in range(self._size):
                if peer != root:
                    self._give(b"bcast", buff, count, datatype, peer)

        self._call(stream, work)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._nccl.calls.append(("send", count, datatype, peer, stream))
        self._call(stream, lambda: self._give(b"send", sendbuf, count, datatype, peer))

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._nccl.calls.append(("recv", count, datatype, peer, stream))
        self._call(stream, lambda: self._take(b"send", recvbuf, count, datatype, peer))

    def _call(self, stream: int, work: Callable[[], None]) -> None:
        if self._nccl.grouped is None:
            self.start(stream, [work])
        else:
            self._nccl.grouped.append((self, stream, work))

    def start(self, stream: int, works: list[Callable[[], None]]) -> None:
        """All of them at the same time, when the stream comes to it."""

        def kernel() -> None:
            self.running += 1
            threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in works]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.running -= 1

        done = threading.Event()
        HostDevice.streams[stream].put(lambda: (kernel(), done.set()))
        if self._nccl.launch_blocks:
            done.wait()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError:
            if self._nccl.notices_death and not self.aborted.is_set():
                self._error = "NCCL_ERROR_REMOTE_ERROR: remote process exited or there was a network error"
            self.aborted.wait()
            # An aborted kernel does not end in the same moment.
            time.sleep(0.1)
        except RuntimeError as error:
            self._error = str(error)
            self.aborted.wait()

    def _give(self, kind: bytes, address: int, count: int, datatype: int, peer: int) -> None:
        nbytes = _span(address, count, datatype)
        link = self._links[peer]
        link.sendall(_LABEL.pack(kind, datatype, count) + ctypes.string_at(address, nbytes))
        _read(link, 1)

    def _take(self, kind: bytes, address: int, count: int, datatype: int, peer: int) -> None:
        nbytes = _span(address, count, datatype)
        link = self._links[peer]
        label = _LABEL.unpack(_read(link, _LABEL.size))
        if (label[0].rstrip(b"\0"), *label[1:]) != (kind, datatype, count):
            raise RuntimeError(f"rank {peer} does {label}, this rank {(kind, datatype, count)}")
        ctypes.memmove(address, _read(link, nbytes), nbytes)
        link.sendall(b"!")


def _span(address: int, count: int, datatype: int) -> int:
    nbytes = count * _ITEM_BYTES[datatype]
    if not HostDevice.reaches(address, nbytes):
        raise RuntimeError("NCCL_ERROR_UNHANDLED_CUDA_ERROR: an illegal memory access was encountered")
    return nbytes


def _mesh(size: int, port: int, rank: int, root: socket.socket | None) -> dict[int, socket.socket]:
    """A connection to every other rank; returns when all are there. Rank 0 tells the others where they listen."""
    links: dict[int, socket.socket] = {}
    if rank == 0:
        assert root is not None
        with root:
            root.settimeout(_WAIT_S)
            ports: dict[int, int] = {}
            while len(links) < size - 1:
                link = root.accept()[0]
                peer, peer_port = struct.unpack("<ii", _read(link, 8))
                links[peer], ports[peer] = link, peer_port
        for link in links.values():
            table = pickle.dumps(ports)
            link.sendall(len(table).to_bytes(4, "little") + table)
        return links
    with socket.create_server((HOST, 0)) as mine:
        mine.settimeout(_WAIT_S)
        links[0] = socket.create_connection((HOST, port))
        links[0].sendall(struct.pack("<ii", rank, mine.getsockname()[1]))
        ports = pickle.loads(_read(links[0], int.from_bytes(_read(links[0], 4), "little")))
        for peer in range(1, rank):
            links[peer] = socket.create_connection((HOST, ports[peer]))
            links[peer].sendall(struct.pack("<i", rank))
        while len(links) < size - 1:
            link = mine.accept()[0]
            links[struct.unpack("<i", _read(link, 4))[0]] = link
    return links


def _shut(link: socket.socket) -> None:
    """Wake threads that wait on it, then close."""
    try:
        link.shutdown(socket.SHUT_RDWR)
    except OSError:
        # The peer was first, or this is the second time.
        pass
    finally:
        link.close()


def _read(link: socket.socket, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        got = link.recv(nbytes - len(data))
        if not got:
            raise ConnectionError("the peer is gone")
        data += got
    return bytes(data)
