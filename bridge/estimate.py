"""How long a weight sync would take on given links: a calculation to check on paper, not a measurement."""

from dataclasses import dataclass

from bridge.sync_plan import SyncPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Rates in bytes per second."""

    into_bridge: float
    """What the bridge's node takes from all trainers together."""
    out_of_bridge: float
    """What the broadcast moves: with NCCL's pipelined ring that of the slowest link, however many workers."""
    load: float
    """What one worker hashes and loads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncEstimate:
    """Seconds of each stage alone, and of all of them overlapped, bucket by bucket."""

    receive_s: float
    broadcast_s: float
    load_s: float
    overlapped_s: float

    def lines(self) -> list[str]:
        """The estimate as text."""
        stages = {"receive": self.receive_s, "broadcast": self.broadcast_s, "load": self.load_s}
        slowest = max(stages, key=lambda name: stages[name])
        return [
            f"sync estimate: {self.overlapped_s:.1f} s overlapped ({self.receive_s:.1f} s into the bridge, "
            f"{self.broadcast_s:.1f} s to the engines, {self.load_s:.1f} s of loading); {slowest} decides"
        ]


def estimate_sync(plan: SyncPlan, links: Links, loaded_share: float = 1.0) -> SyncEstimate:
    """Three stages, each busy with one bucket at a time; the next bucket waits until the stage is free.

    A worker of several in one engine receives every byte, but copies only `loaded_share` of them into its weights.
    """
    rates = (links.into_bridge, links.out_of_bridge, links.load / loaded_share)
    free = [0.0, 0.0, 0.0]
    for bucket in plan.buckets:
        ready = 0.0
        for stage, rate in enumerate(rates):
            free[stage] = max(free[stage], ready) + bucket.nbytes / rate
            ready = free[stage]
    receive, broadcast, load = (plan.nbytes / rate for rate in rates)
    return SyncEstimate(receive_s=receive, broadcast_s=broadcast, load_s=load, overlapped_s=free[-1])
