"""The bridge actor: takes the trainers' pieces bucket by bucket, broadcasts HF-named tensors to engines."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
import torch

from actors import deadline
from actors.engine_group import EngineGroup
from actors.placement import Reservation
from actors.trainer import TrainerGroup
from bridge.exchange import message_bytes, unpack_bucket
from bridge.plan import Bucket, Plan
from bridge.transport.gloo import GlooGroup, bucket_views, connect, free_port
from configs.schema import RunConfig


class Bridge:
    """Holds at most three buckets: one that fills, one that is full, one that is being broadcast."""

    def __init__(self, plan: Plan, buckets: Sequence[Bucket]) -> None:
        self._plan = plan
        self._buckets = tuple(buckets)
        self._trainers: GlooGroup
        self._engines: GlooGroup

    def address(self) -> tuple[str, int, int]:
        """This node's address and two ports free on it a moment ago: for the trainers, for the engines."""
        host = ray.util.get_node_ip_address()
        first, second = free_port(host), free_port(host)
        return host, first, second

    def connect(
        self,
        host: str,
        trainer_port: int,
        num_ranks: int,
        engine_port: int,
        num_workers: int,
        timeout_s: float,
    ) -> None:
        """Join both groups as rank 0; returns when all trainer ranks and all engine workers are there."""
        with ThreadPoolExecutor(2) as pool:
            trainers = pool.submit(connect, host, trainer_port, 0, num_ranks + 1, timeout_s)
            engines = pool.submit(connect, host, engine_port, 0, num_workers + 1, timeout_s)
            self._trainers, self._engines = trainers.result(), engines.result()

    def forward(self) -> dict[str, float]:
        """Move all buckets from the trainers to the engines; the next is received while one is broadcast."""
        start, waited = time.monotonic(), 0.0
        for bucket in self._received():
            before = time.monotonic()
            self._engines.broadcast(bucket, 0)
            waited += time.monotonic() - before
        return {
            "sync/bytes": float(sum(bucket.nbytes for bucket in self._buckets)),
            "sync/buckets": float(len(self._buckets)),
            "sync/bridge_seconds": time.monotonic() - start,
            "sync/broadcast_seconds": waited,
        }

    def _received(self) -> Iterator[torch.Tensor]:
        with ThreadPoolExecutor(1) as pool:
            following: Future[torch.Tensor] = pool.submit(self._receive, self._buckets[0])
            for bucket in self._buckets[1:]:
                full = following.result()
                following = pool.submit(self._receive, bucket)
                yield full
            yield following.result()

    def _receive(self, bucket: Bucket) -> torch.Tensor:
        """One message from each rank that owns part of the bucket, put into place."""
        buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
        views = dict(bucket_views(buffer, bucket))
        for rank in self._plan.owners(bucket):
            message = torch.empty(message_bytes(self._plan, bucket, rank), dtype=torch.uint8)
            self._trainers.recv(message, rank + 1)
            unpack_bucket(message, self._plan, bucket, rank, views)
        return buffer


class WeightBridge:
    """Trainers, bridge actor and engines as one weight sync; implements the WeightSync protocol."""

    def __init__(
        self,
        config: RunConfig,
        reservation: Reservation,
        trainers: TrainerGroup,
        engines: EngineGroup,
    ) -> None:
        """Start the bridge, give everyone the plan, connect the groups, within cluster.start_timeout_s."""
        self._timeout_s = config.cluster.step_timeout_s
        self._trainers = trainers
        self._engines = engines
        plan = trainers.plan
        bucket_bytes = int(config.bridge.bucket_size_mb * (1 << 20))
        buckets = plan.buckets(bucket_bytes)
        options: Mapping[str, Any] = reservation.options("bridge", 0)
        self._bridge: Any = ray.remote(Bridge).options(**options).remote(plan, buckets)
        trainers.follow(bucket_bytes)
        self._connect(config, buckets)

    def _connect(self, config: RunConfig, buckets: Sequence[Bucket]) -> None:
        start_s, collective_s = config.cluster.start_timeout_s, config.cluster.collective_timeout_s
        host, trainer_port, engine_port = deadline.get(
            self._bridge.address.remote(), "bridge", timeout_s=start_s, phase="start of the bridge"
        )
        joining = self._bridge.connect.remote(
            host, trainer_port, self._trainers.size, engine_port, len(self._engines), collective_s
        )
        self._wait(
            joining,
            self._trainers.connect_bridge(host, trainer_port),
            self._engines.init_weights(host, engine_port, collective_s, buckets),
            phase="connection of trainers, bridge and engines",
            timeout_s=start_s,
        )

    def sync(self, version: int) -> Mapping[str, float]:
        """Pause, move every bucket, resume. Returns bytes, buckets and seconds as `sync/...`.

        Raises what the first failing part raised; engines that did not get a full set stay paused.
        """
        start = time.monotonic()
        self._engines.pause()
        results = self._wait(
            self._bridge.forward.remote(),
            self._trainers.send(),
            self._engines.receive(version),
            phase=f"sync of weight version {version}",
            timeout_s=self._timeout_s,
        )
        self._engines.resume()
        return {**results[0], "sync/seconds": time.monotonic() - start}

    def _wait(
        self, bridge: Any, trainers: Sequence[Any], engines: Sequence[Any], *, phase: str, timeout_s: float
    ) -> list[Any]:
        owners = ["bridge", *self._trainers.names, *self._engines.names]
        return deadline.get_all([bridge, *trainers, *engines], owners, timeout_s=timeout_s, phase=phase)
