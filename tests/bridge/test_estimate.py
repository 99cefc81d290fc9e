"""The estimate against times written out by hand."""

import pytest

from bridge.estimate import Links, estimate_sync
from bridge.sync_plan import SyncPlan, cut_plan
from tests.bridge.sync_plans import info, whole


def plan_of(count: int) -> SyncPlan:
    """Buckets of 64 bytes: 56 of a tensor and 8 of its hash."""
    return cut_plan(whole(*(info(f"t{number}.w", 14) for number in range(count))), 56)


@pytest.mark.parametrize(
    ("rates", "seconds"),
    [
        # Receiving takes 1 s a bucket, the other stages half: four buckets, then half and half of the last one.
        ((64, 128, 128), 4 + 0.5 + 0.5),
        # Broadcasting takes 2 s a bucket and starts when the first is there.
        ((64, 32, 128), 1 + 4 * 2 + 0.5),
        # Loading takes 4 s a bucket.
        ((64, 64, 16), 1 + 1 + 4 * 4),
    ],
)
def test_stages_overlap_bucket_by_bucket(rates: tuple[int, int, int], seconds: float) -> None:
    into, out, load = rates
    found = estimate_sync(plan_of(4), Links(into_bridge=into, out_of_bridge=out, load=load))
    assert found.overlapped_s == pytest.approx(seconds)
    assert found.receive_s == pytest.approx(4 * 64 / into)
    slowest = ["receive", "broadcast", "load"][[into, out, load].index(min(rates))]
    assert found.lines()[0].endswith(f"{slowest} decides")


def test_a_worker_that_keeps_a_half_loads_a_half() -> None:
    whole = estimate_sync(plan_of(4), Links(into_bridge=1e9, out_of_bridge=1e9, load=64))
    half = estimate_sync(plan_of(4), Links(into_bridge=1e9, out_of_bridge=1e9, load=64), loaded_share=0.5)
    assert whole.load_s == pytest.approx(2 * half.load_s) == pytest.approx(4.0)
