"""What all ranks do together around a plan: agree on errors, act once, hand whole tensors to everyone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bridge.assembler import Assembler
from bridge.checkpoint import CheckpointError, CheckpointReader
from bridge.checkpoint_writer import CheckpointWriter
from bridge.layouts import Region, region_shape
from bridge.plan import Plan
from bridge.sender import Sender
from bridge.sync_plan import cut_plan
from configs.errors import BasculeError, WriteError

T = TypeVar("T", str, int)


class GuardedWriter:
    """A writer that keeps its first error for later, since the other ranks count on this one to go on."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer
        self.failures: list[str] = []

    def write(self, name: str, region: Region, value: torch.Tensor) -> None:
        """As CheckpointWriter.write, until the first error."""
        with self:
            if not self.failures:
                self._writer.write(name, region, value)

    def commit(self, names: Iterable[str]) -> None:
        """As CheckpointWriter.commit, until the first error."""
        with self:
            if not self.failures:
                self._writer.commit(names)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        # What is carried over is read as well as written.
        caught = isinstance(error, WriteError | CheckpointError)
        if caught:
            self.failures.append(str(error))
        return caught


class GuardedReader:
    """A reader that keeps its first error for later, as GuardedWriter does; what it then gives is of no use."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.tensors = reader.tensors
        self.failures: list[str] = []

    def position(self, name: str) -> tuple[str, int]:
        """As CheckpointReader.position."""
        return self._reader.position(name)

    def read(self, name: str, region: Region) -> torch.Tensor:
        """As CheckpointReader.read, until the first error."""
        out = torch.empty(region_shape(region), dtype=self.tensors[name].dtype)
        self.read_into(name, region, out)
        return out

    def read_into(self, name: str, region: Region, out: torch.Tensor) -> None:
        """As CheckpointReader.read_into, until the first error."""
        if not self.failures:
            try:
                self._reader.read_into(name, region, out)
            except CheckpointError as error:
                self.failures.append(str(error))


def exported(
    plan: Plan, parameters: Mapping[str, torch.Tensor], bucket_bytes: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole tensors of a plan in host memory, in its order, on every rank, a bucket at a time.

    Every rank must go through to the end.
    """
    sync_plan = cut_plan(plan, bucket_bytes)
    sender = Sender(parameters, plan, sync_plan, dist.get_rank())
    # Tensor by tensor, so that no layer of experts is held together.
    assembler = Assembler(sync_plan, key=str)
    # NCCL moves only what is on a GPU.
    device = next(iter(parameters.values())).device
    for number, bucket in enumerate(sync_plan.buckets):
        buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
        for message in bucket.messages:
            part = buffer[message.start : message.stop]
            if message.rank == dist.get_rank():
                part.copy_(sender.pack(number))
            moving = part.to(device)
            dist.broadcast(moving, message.rank)
            if moving is not part:
                part.copy_(moving)
        for unit in assembler.add(number, buffer):
            yield from unit


def everywhere(found: Sequence[T]) -> tuple[T, ...]:
    """What all ranks found, each once, in order."""
    return all_everywhere(found)[0]


def all_everywhere(*found: Sequence[T]) -> list[tuple[T, ...]]:
    """The same of several things at once."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return [tuple(sorted(set[T]().union(*each))) for each in zip(*everyone, strict=True)]


def raise_everywhere(failures: Sequence[str], kind: type[BasculeError]) -> None:
    """Raises an error of `kind` on every rank when one has a failure."""
    found = everywhere(failures)
    if found:
        raise kind("; ".join(found))


def on_first_rank(action: Any) -> None:
    """Run on rank 0 while the others wait; an error of it is raised everywhere."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except BasculeError as error:
            box = [error]
    dist.broadcast_object_list(box, 0)
    if box[0] is not None:
        raise box[0]
