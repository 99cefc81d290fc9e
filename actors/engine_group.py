"""The engines as one sampler, and what a weight update needs from all of them."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import deadline
from actors.dispatch import Room
from actors.engine import Engine, EngineInfo, engine_environment
from actors.env import resolve_device
from algorithms.data import Group, Prompt, SamplingSettings
from bridge.plan import Bucket
from bridge.transport.gloo import buckets_to_wire
from configs.errors import BasculeError
from configs.schema import RunConfig

LOG = logging.getLogger(__name__)


class EngineGroup:
    """Engines as one sampler (algorithms.roles.Sampler), and what a weight update needs from all of them."""

    def __init__(self, engines: Sequence[Any], room: int, timeout_s: float) -> None:
        self._engines = tuple(engines)
        self._names = tuple(f"engine {index}" for index in range(len(self._engines)))
        self._room = Room(len(self._engines), room)
        self._timeout_s = timeout_s

    def __len__(self) -> int:
        return len(self._engines)

    @property
    def names(self) -> tuple[str, ...]:
        """What to call the engines in messages."""
        return self._names

    def generate(self, requests: Iterable[tuple[Prompt, SamplingSettings]]) -> Iterator[Group]:
        """Groups in the order they finish. A request is drawn from `requests` when an engine has room for it.

        Raises the EngineError of an engine, ActorLostError naming engine and prompt, or DeadlineExceededError
        when no group at all was finished within the time for a step. What is in flight then is given up, and
        also when the caller stops iterating.
        """
        waiting = iter(requests)
        following = next(waiting, None)
        running: dict[Any, tuple[int, int, str]] = {}
        try:
            while running or following is not None:
                while following is not None:
                    prompt, sampling = following
                    engine = self._room.take(sampling.n)
                    if engine is None:
                        break
                    ref = self._engines[engine].generate.remote(prompt, sampling)
                    running[ref] = engine, sampling.n, f"{self._names[engine]} (prompt {prompt.id})"
                    following = next(waiting, None)
                yield self._next_group(running)
        finally:
            for ref, (engine, n, _) in running.items():
                self._room.give_back(engine, n)
                # An iterator that an error left behind may be closed only after the run has left Ray; any call
                # would then start a new Ray.
                if ray.is_initialized():
                    ray.cancel(ref, recursive=False)

    def init_weights(
        self, host: str, port: int, timeout_s: float, buckets: Iterable[Bucket]
    ) -> list[ray.ObjectRef]:
        """Let all engines join the group of the sender, which is rank 0 of `len(self) + 1` at `host:port`.

        Returns at once, for the sender has to connect at the same time; then `wait` for the result.
        """
        wire = buckets_to_wire(buckets)
        common = {"host": host, "port": port, "world_size": len(self) + 1, "timeout_s": timeout_s}
        return [
            engine.init_weights.remote({**common, "rank_offset": index + 1, "buckets": wire})
            for index, engine in enumerate(self._engines)
        ]

    def pause(self) -> None:
        """Stop all engines between two tokens."""
        self.wait([engine.pause.remote() for engine in self._engines], "pause of engines")

    def receive(self, version: int) -> list[ray.ObjectRef]:
        """Let all engines receive one full set of weights. Returns at once; `wait` for seconds per engine."""
        return [engine.receive.remote(version) for engine in self._engines]

    def resume(self) -> None:
        """Let all engines go on."""
        self.wait([engine.resume.remote() for engine in self._engines], "resume of engines")

    def abort_all(self) -> int:
        """End all completions now; returns how many prompts those were."""
        return sum(self.wait([engine.abort_all.remote() for engine in self._engines], "abort of completions"))

    def info(self) -> list[EngineInfo]:
        """State of every engine."""
        return self.wait([engine.info.remote() for engine in self._engines], "state of engines")

    def wait(self, refs: Sequence[Any], phase: str) -> list[Any]:
        """Results of one ref per engine. Raises like deadline.get_all."""
        return deadline.get_all(refs, self._names, timeout_s=self._timeout_s, phase=phase)

    def start(self) -> list[ray.ObjectRef]:
        """Let all engines load their models. Returns at once, so that trainers can start meanwhile."""
        return [engine.start.remote() for engine in self._engines]

    def ready(self, refs: Sequence[Any], timeout_s: float) -> None:
        """Wait for what `start` gave; logs the seconds of each engine. Raises like `wait`; none is left then."""
        try:
            seconds = deadline.get_all(refs, self._names, timeout_s=timeout_s, phase="start of engines")
        except BasculeError:
            self.kill()
            raise
        for name, took in zip(self._names, seconds, strict=True):
            LOG.info("%s started in %.1f s", name, took)

    def kill(self) -> None:
        """End all engine processes."""
        for engine in self._engines:
            ray.kill(engine)

    def _next_group(self, running: dict[Any, tuple[int, int, str]]) -> Group:
        owners = [owner for _, _, owner in running.values()]
        ref = deadline.wait_any(list(running), owners, timeout_s=self._timeout_s, phase="generate")
        engine, n, owner = running.pop(ref)
        self._room.give_back(engine, n)
        return deadline.get(ref, owner, timeout_s=self._timeout_s, phase="generate")


def create_engines(
    config: RunConfig,
    model_path: str,
    placement_group: PlacementGroup,
    bundle_indices: Sequence[int],
    *,
    with_weights: bool = True,
) -> EngineGroup:
    """One engine in each of the bundles; `start` and `ready` make them sample, with weight version 0.

    Without weights they start with random ones and have to be sent a version before they sample.
    """
    device = resolve_device(config.model.device)
    environment = engine_environment(model_path, device, config.cluster.cpus_per_engine)
    engines = [
        ray.remote(Engine)
        .options(
            num_cpus=config.cluster.cpus_per_engine,
            num_gpus=1 if device == "cuda" else 0,
            # A restarted actor would come back without its weights and look healthy.
            max_restarts=0,
            max_concurrency=1000,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=bundle
            ),
            runtime_env={"env_vars": environment},
        )
        .remote(f"engine {index}", model_path, config, device, with_weights)
        for index, bundle in enumerate(bundle_indices)
    ]
    return EngineGroup(engines, config.rollout.max_num_seqs, config.cluster.step_timeout_s)
