"""Actors with engines, made and placed."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster import device_of
from actors.engine import Engine
from actors.engine_group import EngineGroup
from actors.engine_pool import EnginePool
from actors.engine_settings import engine_arguments, engine_environment
from actors.events import Event, unheard
from configs.engines import EngineConfig
from configs.schema import RunConfig


def create_engines(
    config: RunConfig,
    model_path: str,
    placement_group: PlacementGroup,
    bundle_indices: Sequence[int],
    *,
    with_weights: bool = True,
    max_lora_rank: int | None = None,
    lora_modules: Sequence[str] | None = None,
    event: Event = unheard,
) -> EngineGroup:
    """One engine in each of the bundles; `start` and `ready` make them sample, with weight version 0.

    Without weights they start with random ones and have to be sent a version before they sample. With a
    `max_lora_rank` they can be sent an adapter; see Engine. `event` is told which are lost and back.
    """
    device = device_of(config)
    arguments = engine_arguments(
        *(config, model_path, device, max_lora_rank, lora_modules), with_weights=with_weights
    )
    pool = start_pool(
        *(config, config.rollout, arguments, placement_group, bundle_indices), kind="engine", event=event
    )
    # Engines hold back what they have no room for, so that they never wait for a trainer that is ahead.
    room = config.rollout.max_num_seqs * (1 + config.grpo.max_lag)
    timeout_s, workers = config.cluster.step_timeout_s, config.rollout.tensor_parallel_size
    return EngineGroup(pool, room, timeout_s, workers, event=event)


def start_pool(
    config: RunConfig,
    engine: EngineConfig,
    arguments: Mapping[str, Any],
    placement_group: PlacementGroup,
    bundle_indices: Sequence[int],
    *,
    kind: str,
    event: Event,
) -> EnginePool:
    """An actor for each bundle, with an engine of these arguments for vLLM; `kind` is what each is called."""
    device, cluster = device_of(config), config.cluster
    environment = engine_environment(arguments["model"], device, cluster.cpus_per_engine)

    def make(index: int) -> Any:
        options: dict[str, Any] = {
            "num_cpus": cluster.cpus_per_engine * engine.tensor_parallel_size,
            "num_gpus": engine.tensor_parallel_size if device == "cuda" else 0,
            # A restarted actor would come back without its weights and look healthy.
            "max_restarts": 0,
            "max_concurrency": 1000,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=bundle_indices[index]
            ),
            "runtime_env": {"env_vars": environment},
        }
        actor: Any = ray.remote(Engine).options(**options)
        return actor.remote(f"{kind} {index}", config, arguments, engine.heartbeat_timeout_s)

    return EnginePool(
        [make(index) for index in range(len(bundle_indices))],
        make,
        start_timeout_s=cluster.start_timeout_s,
        max_recoveries=config.bridge.max_recoveries,
        heartbeat_timeout_s=engine.heartbeat_timeout_s,
        event=event,
        kind=kind,
    )
