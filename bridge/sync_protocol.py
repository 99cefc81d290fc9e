"""The few bytes beside the buckets: what a sync is about, which units changed, what a worker has received."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from bridge.fingerprint import signed


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncOrder:
    """One sync. Trainers, bridge and engines are given the same."""

    version: int
    full: bool = True
    """Send everything; else only units that may have changed since the last sync that was full or partial."""
    hash_every: int = 1
    """Hash one bucket of this many, another one in each version."""

    def hashes(self, number: int) -> bool:
        """Whether the parts of bucket `number` are hashed."""
        return (number + self.version) % self.hash_every == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerReport:
    """What a worker has received, verified and loaded."""

    version: int
    tensors: int
    digest: int
    """Assembler.digest: made from the bytes that arrived."""
    copied: int = 0
    """How many of the tensors were loaded by copies alone, without vLLM's loaders."""


_REPORT_WORDS = 4


def empty_header(num_units: int) -> torch.Tensor:
    """Room for `encode_header`."""
    return torch.empty(16 + num_units, dtype=torch.uint8)


def encode_header(order: SyncOrder, all_units: Sequence[str], units: Collection[str]) -> torch.Tensor:
    """The order, and which of `all_units` are sent; the first message of a sync to engines."""
    words = torch.tensor([order.version, order.hash_every], dtype=torch.int64).view(torch.uint8)
    return torch.cat([words, encode_units(all_units, units)])


def decode_header(header: torch.Tensor, all_units: Sequence[str]) -> tuple[SyncOrder, tuple[str, ...]]:
    """What `encode_header` was given."""
    version, hash_every = header[:16].view(torch.int64).tolist()
    units = decode_units(header[16:], all_units)
    return SyncOrder(version=version, full=len(units) == len(all_units), hash_every=hash_every), units


def encode_units(all_units: Sequence[str], units: Collection[str]) -> torch.Tensor:
    """A byte for each of `all_units`: 1 for those in `units`."""
    chosen = set(units)
    return torch.tensor([unit in chosen for unit in all_units], dtype=torch.uint8)


def decode_units(marks: torch.Tensor, all_units: Sequence[str]) -> tuple[str, ...]:
    """What `encode_units` was given, in order."""
    return tuple(unit for unit, mark in zip(all_units, marks.tolist(), strict=True) if mark)


def empty_report() -> torch.Tensor:
    """Room for `encode_report`."""
    return torch.empty(8 * _REPORT_WORDS, dtype=torch.uint8)


def encode_report(report: WorkerReport) -> torch.Tensor:
    """A report as bytes."""
    words = [report.version, report.tensors, signed(report.digest), report.copied]
    return torch.tensor(words, dtype=torch.int64).view(torch.uint8)


def decode_report(data: torch.Tensor) -> WorkerReport:
    """What `encode_report` was given."""
    version, tensors, digest, copied = data.view(torch.int64).tolist()
    return WorkerReport(version=version, tensors=tensors, digest=digest % (1 << 64), copied=copied)
