"""A gloo group of our own, beside torch's default one, and the form in which a bucket plan travels."""

import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from bridge.plan import Bucket, TensorInfo
from configs.errors import BasculeError


class TransportError(BasculeError):
    """Bytes could not be moved, or do not fit the plan. Names the peer or the tensor."""


class GlooGroup:
    """Ranks that exchange uint8 tensors. After an error it is of no use: close it and connect on a new port.

    Every call blocks until its part is done and raises TransportError when a peer is gone or the group's
    timeout has passed. One thread at a time.
    """

    def __init__(self, store: TCPStore, process_group: dist.ProcessGroupGloo, name: str) -> None:
        self._store: TCPStore | None = store
        self._process_group: dist.ProcessGroupGloo | None = process_group
        self._name = name

    def broadcast(self, t: torch.Tensor, root: int) -> None:
        """Fill `t` on all ranks with the bytes of the root's."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        self._run(f"broadcast from rank {root}", t, lambda group: group.broadcast([t], options))

    def send(self, t: torch.Tensor, dst: int) -> None:
        """Send the bytes of `t` to rank `dst`, which has to receive as many."""
        self._run(f"send to rank {dst}", t, lambda group: group.send([t], dst, 0))

    def recv(self, t: torch.Tensor, src: int) -> None:
        """Fill `t` with bytes from rank `src`."""
        self._run(f"receive from rank {src}", t, lambda group: group.recv([t], src, 0))

    def close(self) -> None:
        """Close the sockets; peers that wait for this rank fail at once. May be called again."""
        self._process_group = None
        self._store = None

    def _run(self, what: str, t: torch.Tensor, start: Any) -> None:
        assert t.dtype == torch.uint8
        assert t.is_contiguous()
        if self._process_group is None:
            raise TransportError(f"{what} in {self._name}: the group is closed; connect anew")
        try:
            start(self._process_group).wait()
        except RuntimeError as error:
            raise TransportError(
                f"{what} in {self._name}, {t.numel()} bytes: {_first_line(error)}"
            ) from error


def connect(host: str, port: int, rank: int, world_size: int, timeout_s: float) -> GlooGroup:
    """A group of `world_size` ranks; rank 0 must run on `host`, and listens on `port`.

    Returns when all ranks are there. Raises TransportError when the port is taken or a rank is missing
    after `timeout_s` seconds, which is also the longest any later call waits.
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
    return GlooGroup(store, process_group, name)


def free_port(host: str) -> int:
    """A port that nothing listened on at `host`, an address of this machine, a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def bucket_views(buffer: torch.Tensor, bucket: Bucket) -> list[tuple[str, torch.Tensor]]:
    """Name and typed view into `buffer` (uint8, `bucket.nbytes` long) of every tensor of the bucket."""
    return [
        (tensor.name, buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        for tensor, start in zip(bucket.tensors, bucket.offsets, strict=True)
    ]


def buckets_to_wire(buckets: Iterable[Bucket]) -> list[dict[str, Any]]:
    """The buckets as plain lists, numbers and strings, which any serializer carries."""
    return [
        {
            "nbytes": bucket.nbytes,
            "tensors": [
                [tensor.name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset]
                for tensor, offset in zip(bucket.tensors, bucket.offsets, strict=True)
            ],
        }
        for bucket in buckets
    ]


def buckets_from_wire(wire: Sequence[Mapping[str, Any]]) -> tuple[Bucket, ...]:
    """What `buckets_to_wire` was given.

    Raises TransportError naming a tensor that comes twice, has an unknown type, is not aligned, overlaps
    the one before, or ends outside its bucket.
    """
    buckets: list[Bucket] = []
    seen: set[str] = set()
    for entry in wire:
        tensors: list[TensorInfo] = []
        offsets: list[int] = []
        end = 0
        for name, dtype_name, shape, offset in entry["tensors"]:
            tensor = TensorInfo(name=name, dtype=_dtype(name, dtype_name), shape=tuple(shape))
            if name in seen:
                raise TransportError(f"bucket plan: {name} comes twice")
            if offset % tensor.dtype.itemsize:
                raise TransportError(f"bucket plan: {name} at byte {offset} is not aligned for {dtype_name}")
            if offset < end or offset + tensor.nbytes > entry["nbytes"]:
                raise TransportError(
                    f"bucket plan: {name} takes bytes {offset} to {offset + tensor.nbytes}, but {end} to "
                    f"{entry['nbytes']} are left in its bucket"
                )
            seen.add(name)
            end = offset + tensor.nbytes
            tensors.append(tensor)
            offsets.append(offset)
        buckets.append(Bucket(tensors=tuple(tensors), offsets=tuple(offsets), nbytes=entry["nbytes"]))
    return tuple(buckets)


def _dtype(name: str, dtype_name: str) -> torch.dtype:
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise TransportError(f"bucket plan: {name} has the unknown type {dtype_name!r}")
    return dtype


def _local_address(host: str, port: int) -> str:
    """The address of this machine on the route to `host`. No packet is sent."""
    info = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(info[0], socket.SOCK_DGRAM) as probe:
        probe.connect(info[4])
        return probe.getsockname()[0]


def _first_line(error: Exception) -> str:
    """The message without the C++ stack that torch appends."""
    return str(error).partition("\n")[0]
