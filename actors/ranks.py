"""What every kind of Megatron rank has in common: how the actors start and how they find each other."""

import os
from collections.abc import Sequence
from typing import Any

import ray

from actors.env import check_one_source, threads_of
from actors.megatron_start import start_rank
from actors.placement import Reservation
from bridge.transport.gloo import free_port
from configs.schema import ClusterConfig, LayoutConfig

# Has to be there before CUDA starts: a workspace for cuBLAS that does not change, and one order of sums for NCCL.
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def start_ranks(
    kind: type,
    reservation: Reservation,
    owner: str,
    count: int,
    arguments: Sequence[Any],
    *,
    deterministic: bool = False,
) -> list[Any]:
    """Actors of `kind`, made with (*arguments, rank), in the reserved bundles of `owner`.

    Each computes with as many threads as it has CPUs, at least one, unless OMP_NUM_THREADS says otherwise.
    """
    actor_class = ray.remote(kind)

    def start(rank: int) -> Any:
        options: dict[str, Any] = reservation.options(owner, rank)
        threads = os.environ.get("OMP_NUM_THREADS") or threads_of(options["num_cpus"])
        env = {"OMP_NUM_THREADS": threads} | (_DETERMINISTIC if deterministic else {})
        return actor_class.options(**options, runtime_env={"env_vars": env}).remote(*arguments, rank)

    return [start(rank) for rank in range(count)]


def free_address() -> str:
    """A `tcp://` rendezvous that was free on this actor's node a moment ago."""
    host = ray.util.get_node_ip_address()
    return f"tcp://{host}:{free_port(host)}"


def join(
    layout: LayoutConfig, cluster: ClusterConfig, *, rank: int, address: str, device: str, seed: int
) -> None:
    """Make this process a Megatron rank; every rank must call it. Imports Megatron, so nothing may have before.

    Raises BasculeError when the ranks do not all come.
    """
    check_one_source()
    start_rank(
        layout,
        rank=rank,
        world_size=layout.world_size,
        address=address,
        timeout_s=cluster.collective_timeout_s,
        seed=seed,
        device=device,
    )
