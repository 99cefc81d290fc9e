"""Notices that a node of the run is being drained: Kubernetes or a cloud takes it away in a while."""

import threading
import time
from collections.abc import Callable, Generator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.worker import global_worker
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table

from actors.ending import TEMPORARY, Ending, Reason
from actors.placement import Reservation

_LOOK_S = 2.0
_ASK_S = 5.0
# Ray's default drain time when a notice has no deadline.
_NO_DEADLINE_S = 30.0


@contextmanager
def watched(reservation: Reservation, ending: Ending) -> Generator[None]:
    """Ends the run when a node that hosts some of it drains, while the body runs.

    Ray has no public call for it: `get_draining_nodes` of the GCS client is what its own Serve asks (Ray 2.60).
    """
    over = threading.Event()
    worker: Any = global_worker
    client = worker.gcs_client

    def look() -> None:
        while not over.wait(_LOOK_S):
            try:
                draining: Mapping[str, int] = client.get_draining_nodes(timeout=_ASK_S)
                reason = reason_of(draining, lambda: _nodes(reservation)) if draining else None
            except (RayError, RuntimeError, TimeoutError):
                # A GCS that does not answer shows in everything else the run does.
                continue
            if reason is not None:
                ending.request(reason)
                return

    thread = threading.Thread(target=look, name="watch-draining", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        # A call that comes after the run has left Ray would start a new one.
        thread.join(_ASK_S + _LOOK_S)


def reason_of(draining: Mapping[str, int], nodes: Callable[[], Set[str]]) -> Reason | None:
    """Why the run has to end: a draining node (id to Unix time in ms, 0 for none) is one of its `nodes`."""
    ours = draining.keys() & nodes()
    if not ours:
        return None
    node = min(ours, key=lambda each: draining[each] or float("inf"))
    left = draining[node] / 1e3 - time.time() if draining[node] else _NO_DEADLINE_S
    return Reason(
        text=f"node {node[:8]} is draining, {left:.0f} s are left",
        exit_code=TEMPORARY,
        until=time.monotonic() + max(left, 0.0),
    )


def _nodes(reservation: Reservation) -> Set[str]:
    table: Mapping[str, Any] = placement_group_table(reservation.group)
    return {*table["bundles_to_node_id"].values(), ray.get_runtime_context().get_node_id()}
