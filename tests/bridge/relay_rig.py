"""Two trainer ranks, a bridge and two workers as threads, over real gloo groups."""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from bridge.assembler import Assembler
from bridge.layouts import slices
from bridge.plan import Piece, Plan, TensorInfo
from bridge.relay import Relay
from bridge.sender import Sender
from bridge.sync_plan import SyncPlan, cut_plan
from bridge.sync_protocol import (
    SyncOrder,
    WorkerReport,
    decode_header,
    decode_units,
    empty_header,
    encode_report,
    encode_units,
)
from bridge.transport.base import Group
from bridge.transport.gloo import connect, free_port
from bridge.transport.loopback import HostedGroup, loopback

HOST = "127.0.0.1"
TRAINERS = ("bridge", "trainer rank 0", "trainer rank 1")
ENGINES = ("bridge", "engine 0", "engine 1")


def make_plan(seed: int) -> tuple[Plan, dict[str, torch.Tensor]]:
    """Tensors of three types; some belong to one of two ranks, some are split by rows or by columns."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tensors: list[TensorInfo] = []
    pieces: dict[str, tuple[Piece, ...]] = {}
    values: dict[str, torch.Tensor] = {}
    for number in range(16):
        name = f"model.layers.{number // 4}.{'ab'[number % 2]}.t{number}.weight"
        rows, columns = chance.randint(2, 30), chance.randint(2, 30)
        dtype = chance.choice([torch.bfloat16, torch.float32, torch.float16])
        values[name] = torch.randn(rows, columns, generator=generator).to(dtype)
        tensors.append(TensorInfo(name=name, dtype=dtype, shape=(rows, columns)))
        cut = chance.choice(["none", "rows", "columns"])
        regions = {
            "none": [((0, rows), (0, columns))],
            "rows": [((0, rows // 2), (0, columns)), ((rows // 2, rows), (0, columns))],
            "columns": [((0, rows), (0, columns // 2)), ((0, rows), (columns // 2, columns))],
        }[cut]
        first = chance.randint(0, 1) if cut == "none" else 0
        pieces[name] = tuple(
            Piece(
                tensor=name,
                region=region,
                rank=first + place,
                parameter=name,
                local_region=tuple((0, stop - start) for start, stop in region),
            )
            for place, region in enumerate(regions)
        )
    return Plan(tensors=tuple(tensors), pieces=pieces), values


class Counted:
    """A group that counts what goes through it and may change it."""

    def __init__(self, group: Group, spoil: Callable[[int, torch.Tensor], None]) -> None:
        self._group = group
        self._spoil = spoil
        self.broadcasts = 0

    @property
    def waits_for(self) -> str:
        return self._group.waits_for

    def broadcast(self, t: torch.Tensor, root: int) -> None:
        if self.broadcasts:  # the first is the header
            self._spoil(self.broadcasts - 1, t)
        self.broadcasts += 1
        self._group.broadcast(t, root)

    def send(self, t: torch.Tensor, dst: int) -> None:
        self._group.send(t, dst)

    def recv(self, t: torch.Tensor, src: int) -> None:
        self._group.recv(t, src)

    def recv_each(self, parts: Sequence[tuple[torch.Tensor, int]]) -> None:
        self._group.recv_each(parts)

    def close(self) -> None:
        self._group.close()


@dataclass
class Worker:
    """What an engine's worker does, without an engine."""

    plan: SyncPlan
    group: Group
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    units: list[list[str]] = field(default_factory=list)

    def receive(self) -> SyncOrder:
        header = empty_header(len(self.plan.units))
        self.group.broadcast(header, 0)
        order, units = decode_header(header, self.plan.units)
        assembler = Assembler(self.plan, units)
        loaded = 0
        for number in self.plan.buckets_of(units):
            buffer = torch.empty(self.plan.buckets[number].nbytes, dtype=torch.uint8)
            self.group.broadcast(buffer, 0)
            for unit in assembler.add(number, buffer, with_hashes=order.hashes(number)):
                self.units.append([name for name, _ in unit])
                self.weights.update(unit)
                loaded += len(unit)
        assert assembler.missing == []
        report = WorkerReport(version=order.version, tensors=loaded, digest=assembler.digest)
        self.group.send(encode_report(report), 0)
        return order


class Rig:
    """Two ranks, a bridge and two workers. `hosted` puts the bridge into rank 0."""

    def __init__(
        self, seed: int = 0, bucket_bytes: int = 1000, *, keep: bool = False, hosted: bool = False
    ) -> None:
        self.plan, self.values = make_plan(seed)
        self.sync_plan = cut_plan(self.plan, bucket_bytes)
        self.relay = Relay(self.sync_plan, keep=keep)
        self.held: list[dict[str, torch.Tensor]] = [{}, {}]
        for name, pieces in self.plan.pieces.items():
            for piece in pieces:
                # Trained in float32, sent in the tensor's own type.
                self.held[piece.rank][name] = self.values[name][slices(piece.region)].float().contiguous()
        self.senders = [Sender(held, self.plan, self.sync_plan, rank) for rank, held in enumerate(self.held)]
        self.spoil: Callable[[int, torch.Tensor], None] = lambda number, buffer: None
        self.pool = ThreadPoolExecutor(8)
        self.hosted = hosted
        self.connect()

    def connect(self) -> None:
        ports = free_port(HOST), free_port(HOST)
        engines = [
            self.pool.submit(connect, HOST, ports[1], rank, 3, 20, ENGINES) for rank in range(len(ENGINES))
        ]
        names = TRAINERS if not self.hosted else ("bridge", "trainer rank 1")
        trainers = [
            self.pool.submit(connect, HOST, ports[0], rank, len(names), 20, names)
            for rank in range(len(names))
        ]
        groups: list[Any] = [each.result() for each in trainers]
        self.ranks = (1, 2)
        if self.hosted:
            there, here = loopback(20)
            groups = [HostedGroup(there, groups[0]), here, groups[1]]
            self.ranks = (0, 1)
        self.trainers = groups
        joined = [each.result() for each in engines]
        self.engines = Counted(joined[0], self._spoil)
        self.workers = [Worker(plan=self.sync_plan, group=group) for group in joined[1:]]

    def _spoil(self, number: int, buffer: torch.Tensor) -> None:
        self.spoil(number, buffer)

    def send(self, rank: int, order: SyncOrder) -> None:
        group = self.trainers[rank + 1]
        units = self.sync_plan.units
        if not order.full:
            group.send(encode_units(units, self.senders[rank].changed_units()), 0)
            marks = torch.empty(len(units), dtype=torch.uint8)
            group.recv(marks, 0)
            units = decode_units(marks, units)
        due = self.sync_plan.buckets_of(units)
        for number in self.senders[rank].buckets:
            if number in due:
                group.send(self.senders[rank].pack(number, with_hashes=order.hashes(number)), 0)

    def sync(self, order: SyncOrder) -> dict[str, float]:
        self.engines.broadcasts = 0
        sending = [self.pool.submit(self.send, rank, order) for rank in (0, 1)]
        receiving = [self.pool.submit(worker.receive) for worker in self.workers]
        metrics = self.relay.forward(self.trainers[0], self.engines, order, self.ranks, ENGINES[1:])
        for each in [*sending, *receiving]:
            each.result()
        return metrics

    def close(self) -> None:
        for group in [*self.trainers, self.engines, *(worker.group for worker in self.workers)]:
            group.close()
        self.pool.shutdown()
