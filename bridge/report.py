"""What a plan costs each rank, in numbers: before anything is started, or beside what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from bridge.exchange import is_split_by_columns, transfers
from bridge.layouts import region_numel
from bridge.megatron import Claims
from bridge.plan import Plan
from bridge.sync_plan import SyncPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanReport:
    """Bytes by rank. `read` and `swapped` are of a load, `written` of a save, `sent` of a sync to engines."""

    tensors: int
    nbytes: int
    read: tuple[int, ...]
    swapped: tuple[int, ...]
    written: tuple[int, ...]
    sent: tuple[int, ...]
    buckets: int
    largest_bucket: int
    largest_message: int

    def lines(self) -> list[str]:
        """The report as text."""
        return [
            f"tensors: {self.tensors}, {_size(self.nbytes)}",
            f"ranks: {len(self.read)}",
            f"load: {_spread(self.read)} read per rank, every byte of its shard once",
            f"      {_spread(self.swapped)} of that swapped with ranks that split a matrix by columns",
            f"save: {_spread(self.written)} written per rank, replicas share the work",
            f"sync: {_spread(self.sent)} sent per rank to the bridge, "
            f"{self.buckets} buckets to the engines, the largest {_size(self.largest_bucket)}",
            f"peak buffer: {_size(self.largest_message)} on a rank, two buckets "
            f"({_size(2 * self.largest_bucket)}) on the bridge",
        ]


def report_plan(plan: Plan, claims: Sequence[Claims], sync_plan: SyncPlan) -> PlanReport:
    """Add up the plan of ranks that hold `claims`; `sync_plan` is cut from it."""
    infos = {info.name: info for info in plan.tensors}
    ranks = range(len(claims))
    sent, written, swapped = ([0 for _ in ranks] for _ in range(3))
    for info in plan.tensors:
        pieces = plan.pieces[info.name]
        for piece in pieces:
            sent[piece.rank] += region_numel(piece.region) * info.dtype.itemsize
        if not is_split_by_columns(info, pieces):
            for piece in pieces:
                written[piece.rank] += region_numel(piece.region) * info.dtype.itemsize
            continue
        for move in transfers(info, pieces):
            written[move.block.rank] += move.nbytes
            if move.block.rank != move.piece.rank:
                swapped[move.piece.rank] += move.nbytes
    return PlanReport(
        tensors=len(infos),
        nbytes=sum(info.nbytes for info in infos.values()),
        read=tuple(
            sum(region_numel(piece.region) * infos[piece.tensor].dtype.itemsize for piece in claim.pieces)
            for claim in claims
        ),
        swapped=tuple(swapped),
        written=tuple(written),
        sent=tuple(sent),
        buckets=len(sync_plan.buckets),
        largest_bucket=sync_plan.largest_bucket,
        largest_message=max(message.nbytes for bucket in sync_plan.buckets for message in bucket.messages),
    )


def _spread(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return _size(low) if low == high else f"{_size(low)} to {_size(high)}"


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
