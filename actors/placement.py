"""What a run reserves from Ray: one placement group, a bundle for each actor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.engines import EngineConfig
from configs.errors import BasculeError
from configs.export import ExportConfig
from configs.schema import LayoutConfig, RunConfig

if TYPE_CHECKING:
    from actors.model_source import ModelSize

_GIB = 1 << 30
_SMALL_CPUS = 0.1
# What is no group of nodes by itself works beside the engines.
_BESIDE = {"engine": "rollout", "reward": "rollout", "environment": "rollout"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """Resources of one actor. `memory` is an estimate in bytes that Ray accounts, not a limit."""

    owner: str
    cpus: float
    gpus: int
    memory: int

    @property
    def resources(self) -> dict[str, float]:
        """In Ray's terms."""
        asked = {"CPU": self.cpus, "memory": float(self.memory)}
        return asked | ({"GPU": float(self.gpus)} if self.gpus else {})

    @property
    def nodes(self) -> str:
        """Whose nodes it belongs on: the value of `cluster.node_label` there."""
        return _BESIDE.get(self.owner, self.owner)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """A placement group and which of its bundles belong to whom."""

    group: PlacementGroup
    bundles: tuple[Bundle, ...]

    def indices(self, owner: str) -> list[int]:
        """Bundle numbers of an owner, in order."""
        return [index for index, bundle in enumerate(self.bundles) if bundle.owner == owner]

    def options(self, owner: str, number: int) -> dict[str, object]:
        """Actor options that put actor `number` of `owner` into its bundle; it is never restarted by Ray.

        An actor that Ray restarts comes back with its first state and looks healthy.
        """
        index = self.indices(owner)[number]
        bundle = self.bundles[index]
        return {
            "num_cpus": bundle.cpus,
            "num_gpus": bundle.gpus,
            "memory": bundle.memory,
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=index
            ),
        }


def bundles_of(
    config: RunConfig, size: "ModelSize", device: str, teacher: "ModelSize | None" = None
) -> tuple[Bundle, ...]:
    """The bundles of a run, with memory estimated from the sizes of the model and of a teacher that it runs."""
    trainer, rollout, cluster = config.trainer, config.rollout, config.cluster
    gpus = 1 if device == "cuda" else 0
    item = 2 if config.model.torch_dtype == "bfloat16" else 4
    # Parameters, float32 gradients, and float32 main parameters with two moments, split over replicas.
    shares = _shares(trainer, size)
    state = sum(share * (item + 4) + share * 12 // replicas for share, replicas in shares)
    weights = sum(share for share, _ in shares) * item
    frozen = weights if _has_reference(config) else 0
    if teacher is not None and config.teacher_place == "trainer":
        frozen += sum(share for share, _ in _shares(trainer, teacher)) * item
    # While a state to resume from is written, a copy of weights and optimizer is in host memory as well. On a GPU
    # what is counted here anyway is more.
    if device == "cpu" and config.checkpoint.resume_steps:
        state += sum(share * item + share * 12 // replicas for share, replicas in shares)
    if config.tuner.tuner_type == "lora":
        # Gradients, optimizer state and copies are of adapters, which are a few hundredths of the model.
        state = weights + weights // 4
    ranks = [
        Bundle(owner="trainer", cpus=cluster.cpus_per_trainer_rank, gpus=gpus, memory=_GIB + state + frozen)
    ] * trainer.world_size
    teachers: list[Bundle] = []
    if teacher is not None and config.teacher_place == "engine":
        bundle = _engine_bundle("teacher", config, config.teacher.engine, teacher, device)
        teachers = [bundle] * config.teacher.engine.num_engines
    if not config.has_engines:
        return (*ranks, *teachers)
    engine = _engine_bundle("engine", config, rollout, size, device)
    settings = config.bridge
    held = (
        size.num_parameters * item
        if settings.offload_bridge
        else 2 * int(settings.bucket_size_mb * (1 << 20))
    )
    small: list[Bundle] = []
    if config.algorithm == "grpo":
        worker = Bundle(owner="reward", cpus=_SMALL_CPUS, gpus=0, memory=_GIB // 2)
        small += [worker] * config.reward_workers.num_workers
        if config.environment.function is not None:
            small += [replace(worker, owner="environment")] * config.environment.num_processes
    if settings.placement == "trainer":
        ranks[0] = replace(ranks[0], memory=ranks[0].memory + held)
    else:
        small.insert(0, Bundle(owner="bridge", cpus=_SMALL_CPUS, gpus=0, memory=_GIB // 2 + held))
    return (*ranks, *[engine] * rollout.num_engines, *teachers, *small)


def _engine_bundle(
    owner: str, config: RunConfig, engine: EngineConfig, size: "ModelSize", device: str
) -> Bundle:
    workers, item = engine.tensor_parallel_size, 2 if config.model.torch_dtype == "bfloat16" else 4
    return Bundle(
        owner=owner,
        cpus=config.cluster.cpus_per_engine * workers,
        gpus=workers if device == "cuda" else 0,
        # Every worker is a process; together they hold the weights, and once more what is being loaded.
        memory=_GIB * workers
        + _GIB // 2
        + size.num_parameters * item * 2
        + (engine.kv_cache_memory_bytes if device == "cpu" else 0),
    )


def _has_reference(config: RunConfig) -> bool:
    """Whether the trainers hold a second model. With LoRA it can be the policy's with its adapters off."""
    if config.algorithm != "grpo" or config.grpo.beta == 0:
        return False
    model, tuner = config.model, config.tuner
    if tuner.tuner_type != "lora" or model.ref_model is not None or model.mcore_ref_model is not None:
        return True
    return tuner.ref_adapters is not None or bool(tuner.modules_to_save)


def _shares(layout: LayoutConfig, size: "ModelSize") -> list[tuple[int, int]]:
    """Parameters of a rank and how many ranks hold the same: those outside of experts, then those inside."""
    stages = layout.pipeline_model_parallel_size
    dense = layout.tensor_model_parallel_size * stages
    experts = layout.expert_model_parallel_size * layout.expert_tensor_size * stages
    counts = (size.num_parameters - size.num_in_experts, dense), (size.num_in_experts, experts)
    return [(count // ranks, layout.world_size // ranks) for count, ranks in counts]


def export_bundles(config: ExportConfig, size: "ModelSize", device: str) -> tuple[Bundle, ...]:
    """The bundles of an export: its ranks, each with its share of the model in the type that is asked for."""
    layout = config.layout
    share = sum(share for share, _ in _shares(layout, size))
    if config.torch_dtype is None:
        share = share * size.nbytes // size.num_parameters
    else:
        share *= 4 if config.torch_dtype == "float32" else 2
    rank = Bundle(
        owner="export",
        cpus=config.cluster.cpus_per_trainer_rank,
        gpus=1 if device == "cuda" else 0,
        memory=_GIB + share,
    )
    return (rank,) * layout.world_size


def reserve(
    bundles: Sequence[Bundle], *, timeout_s: float, can_grow: bool, node_label: str | None = None
) -> Reservation:
    """Reserve all bundles or none, waiting at most `timeout_s`; at once when the cluster cannot grow.

    With a `node_label` each bundle goes to nodes whose label of that name is Bundle.nodes. Raises BasculeError
    saying what was asked and what exists.
    """
    exists = ray.cluster_resources()
    asked = _total(bundles)
    if not can_grow and any(exists.get(name, 0) < amount for name, amount in asked.items()):
        raise BasculeError(_shortage(bundles, asked, exists, waited=0))
    selectors = [] if node_label is None else [{node_label: bundle.nodes} for bundle in bundles]
    labels: dict[str, Any] = {"bundle_label_selector": selectors} if selectors else {}
    group = placement_group([bundle.resources for bundle in bundles], strategy="PACK", **labels)
    if not group.wait(timeout_s):
        remove_placement_group(group)
        message = _shortage(bundles, asked, ray.available_resources(), waited=timeout_s)
        raise BasculeError(message + _labels(bundles, node_label))
    return Reservation(group=group, bundles=tuple(bundles))


def describe(bundles: Sequence[Bundle]) -> str:
    """One line for each kind of actor: how many, with what."""
    counts: dict[Bundle, int] = {}
    for bundle in bundles:
        counts[bundle] = counts.get(bundle, 0) + 1
    return "\n".join(
        f"  {count} x {bundle.owner}: {bundle.cpus:g} CPU, {bundle.gpus} GPU, {bundle.memory / _GIB:.1f} GiB"
        for bundle, count in counts.items()
    )


def _labels(bundles: Sequence[Bundle], node_label: str | None) -> str:
    """What the nodes' labels have to be, for a message; they may be what is missing."""
    if node_label is None:
        return ""
    found = sorted(
        {node.get("Labels", {}).get(node_label, "(none)") for node in ray.nodes() if node["Alive"]}
    )
    wanted = sorted({bundle.nodes for bundle in bundles})
    return (
        f"\ncluster.node_label: nodes with {node_label} = {', '.join(wanted)} are needed; those that there are "
        f"have {', '.join(found)}"
    )


def _total(bundles: Sequence[Bundle]) -> dict[str, float]:
    total: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.resources.items():
            total[name] = round(total.get(name, 0) + amount, 4)
    return total


def _shortage(
    bundles: Sequence[Bundle], asked: Mapping[str, float], exists: Mapping[str, float], *, waited: float
) -> str:
    def show(amounts: Mapping[str, float]) -> str:
        return (
            f"{amounts.get('CPU', 0):g} CPU, {amounts.get('GPU', 0):g} GPU, "
            f"{amounts.get('memory', 0) / _GIB:.1f} GiB memory"
        )

    after = f" after {waited:.0f} s" if waited else ""
    return (
        f"the run does not fit into the cluster{after}: it asks for {show(asked)}; there are {show(exists)}\n"
        f"{describe(bundles)}\n"
        "use fewer ranks or engines, set cluster.cpus_per_trainer_rank, cluster.cpus_per_engine or "
        "cluster.num_cpus, or a larger cluster"
    )
