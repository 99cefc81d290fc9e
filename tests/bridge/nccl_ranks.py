"""Ranks of an NCCL group on the fake: processes that run functions, and the ends of a sync."""

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from bridge import sync_protocol
from bridge.assembler import Assembler
from bridge.plan import Piece, Plan, TensorInfo, build_plan
from bridge.sender import Sender
from bridge.sync_plan import cut_plan
from bridge.transport.errors import TransportError
from bridge.transport.gloo import free_port
from bridge.transport.nccl import NcclGroup, connect
from tests.bridge.nccl_fake import HOST, FakeNccl, HostDevice

_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A rank of a group."""

    rank: int
    group: NcclGroup
    device: HostDevice
    nccl: FakeNccl


def member(
    body: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    timeout_s: float,
    options: Mapping[str, Any],
    *args: Any,
) -> Any:
    """What `body` returns, or the TransportError that it raises."""
    device, nccl = HostDevice(), FakeNccl(**options)
    group = connect(HOST, port, rank, size, timeout_s, device=device, nccl=nccl)
    try:
        return body(Member(rank=rank, group=group, device=device, nccl=nccl), *args)
    except TransportError as error:
        return error
    finally:
        group.close()


def serve(pipes: Sequence[Connection]) -> None:
    """In a process for each pipe, run what comes until nothing comes any more."""
    commands, *others = pipes
    # Forked before there is any thread, so that they share the imports.
    child = os.fork() if others else 0
    if others and child == 0:
        serve(others)
        os._exit(0)
    while (command := commands.recv()) is not None:
        function, *args = command
        try:
            commands.send(function(*args))
        # Raised again where it was asked for.
        except Exception as error:  # noqa: BLE001
            commands.send(error)
    if child:
        os.waitpid(child, 0)


@contextmanager
def serving(count: int) -> Generator[Sequence[Connection]]:
    """Other processes that take (function, arguments) and answer; the last of them may be killed."""
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in range(count)]
    root = context.Process(target=serve, args=([theirs for _, theirs in pipes],), daemon=True)
    root.start()
    connections = [ours for ours, _ in pipes]
    # When all is imported, so that no timeout of a test counts that.
    connections[0].send((os.getpid,))
    answer(connections[0])
    yield connections
    for _, theirs in pipes:
        theirs.close()
    for ours in connections:
        with suppress(BrokenPipeError):
            ours.send(None)
        ours.close()
    root.join(_WAIT_S)


def on_ranks(
    processes: Sequence[Connection],
    size: int,
    body: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60,
    **options: Any,
) -> list[Any]:
    """Results of `body` by rank: rank 0 here, the others in a process each."""
    port = free_port(HOST)
    for rank in range(1, size):
        processes[rank - 1].send((member, body, rank, size, port, timeout_s, options, *args))
    own = member(body, 0, size, port, timeout_s, options, *args)
    return [own, *(answer(process) for process in processes[: size - 1])]


def answer(process: Connection) -> Any:
    assert process.poll(_WAIT_S)
    result = process.recv()
    if isinstance(result, Exception) and not isinstance(result, TransportError):
        raise result
    return result


SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": ((8, 4), torch.bfloat16),
    "model.layers.0.self_attn.k_proj.weight": ((4, 4), torch.float8_e4m3fn),
    "model.norm.weight": ((6,), torch.float32),
}
Q, K, NORM = SHAPES


def weights(version: int) -> dict[str, torch.Tensor]:
    """Those of a version; the norm is the same in all."""
    numbers = torch.Generator().manual_seed(version)
    made = {name: torch.randn(shape, generator=numbers).to(dtype) for name, (shape, dtype) in SHAPES.items()}
    return {**made, NORM: torch.arange(6.0)}


def plan() -> Plan:
    """q by halves on ranks 0 and 1, k on rank 1, the norm on rank 0."""
    four, six = ((0, 4), (0, 4)), ((0, 6),)
    claims = [
        Piece(tensor=Q, region=four, rank=0, parameter="q", local_region=four),
        Piece(tensor=Q, region=((4, 8), (0, 4)), rank=1, parameter="q", local_region=four),
        Piece(tensor=K, region=four, rank=1, parameter="k", local_region=four),
        Piece(tensor=NORM, region=six, rank=0, parameter="norm", local_region=six),
    ]
    tensors = [TensorInfo(name=name, dtype=dtype, shape=shape) for name, (shape, dtype) in SHAPES.items()]
    return build_plan(tensors, claims)


BUCKET_BYTES = 48
ORDERS = tuple(sync_protocol.SyncOrder(version=version, full=False) for version in (1, 2))


def train(me: Member) -> None:
    rank = me.rank - 1
    owned: dict[str, torch.Tensor] = {"q": torch.empty(4, 4, dtype=torch.bfloat16)}
    owned |= {"norm": torch.empty(6)} if rank == 0 else {"k": torch.empty(4, 4).to(torch.float8_e4m3fn)}
    cut = cut_plan(plan(), BUCKET_BYTES)
    sender = Sender(owned, plan(), cut, rank)
    for order in ORDERS:
        q, k, norm = weights(order.version).values()
        for name, parameter in owned.items():
            parameter.copy_({"q": q[4 * rank : 4 * rank + 4], "k": k, "norm": norm}[name])
        me.group.send(sync_protocol.encode_units(cut.units, sender.changed_units()), 0)
        marks = torch.empty(len(cut.units), dtype=torch.uint8)
        me.group.recv(marks, 0)
        due = cut.buckets_of(sync_protocol.decode_units(marks, cut.units))
        for number in sender.buckets:
            if number in due:
                me.group.send(sender.pack(number), 0)


def train_both(port: int) -> list[Any]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda rank: member(train, rank, 3, port, 60, {}), (1, 2)))


def load(me: Member) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """What arrives in three updates."""
    cut = cut_plan(plan(), BUCKET_BYTES)
    arrived: list[tuple[int, dict[str, torch.Tensor]]] = []
    for _ in range(3):
        header = sync_protocol.empty_header(len(cut.units))
        me.group.broadcast(header, 0)
        order, units = sync_protocol.decode_header(header, cut.units)
        assembler = Assembler(cut, units)
        loaded: dict[str, torch.Tensor] = {}
        for number in cut.buckets_of(units):
            buffer = me.device.empty(cut.buckets[number].nbytes)
            me.group.broadcast(buffer, 0)
            loaded |= {name: t.clone() for unit in assembler.add(number, buffer) for name, t in unit}
        assert not assembler.missing
        report = sync_protocol.WorkerReport(
            version=order.version, tensors=len(loaded), digest=assembler.digest
        )
        me.group.send(sync_protocol.encode_report(report), 0)
        arrived.append((order.version, {name: t.view(torch.uint8) for name, t in loaded.items()}))
    return arrived
