"""Pods for the bundles of a run: groups of equal pods, each with its part of the actors."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil

from actors.placement import Bundle
from configs.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class PodGroup:
    """Equal pods. What one has is for its actors alone: Ray's own processes come on top."""

    name: str
    """The value of `cluster.node_label` on its nodes."""
    pods: int
    cpus: int
    gpus: int
    memory: int
    """Bytes."""
    actors: tuple[tuple[str, int], ...]
    """Kinds of actors, and how many of each one pod has room for."""


def pod_groups(bundles: Sequence[Bundle], *, gpus_per_node: int, together: int) -> tuple[PodGroup, ...]:
    """Groups that all `bundles` fit into, in their order; a pod takes at most `gpus_per_node` GPUs.

    On CPU it takes as many ranks, or workers of engines. Where a node has room for `together` trainer ranks
    (those of a tensor-parallel group), a pod has room for a multiple of them. Raises ConfigError for an engine
    that is larger than a node, since all of its workers are in one bundle.
    """
    named = {bundle.nodes: [each for each in bundles if each.nodes == bundle.nodes] for bundle in bundles}
    return tuple(_group(name, inside, gpus_per_node, together) for name, inside in named.items())


def _group(name: str, bundles: Sequence[Bundle], gpus_per_node: int, together: int) -> PodGroup:
    # The first ones are what the group is for; rewards and environments come beside them.
    main = [bundle for bundle in bundles if bundle.owner == bundles[0].owner]
    beside = [bundle for bundle in bundles if bundle.owner != bundles[0].owner]
    room = gpus_per_node // max(1, main[0].gpus)
    if room == 0:
        raise ConfigError(
            f"kubernetes.gpus_per_node: an {main[0].owner} has {main[0].gpus} GPUs "
            f"(rollout.tensor_parallel_size), more than the {gpus_per_node} of a node, and cannot be on two"
        )
    unit = together if name == "trainer" and together <= room else 1
    each = unit * _divisor(ceil(len(main) / unit), room // unit)
    pods = ceil(len(main) / each)
    # The first trainer rank may need more memory than the others, and may come to any of the pods.
    largest = sorted(main, key=lambda bundle: bundle.memory, reverse=True)[:each]
    shares = [share for _, kind in groupby(beside) for share in _share(list(kind), pods)]
    inside = [*largest, *shares]
    return PodGroup(
        name=name,
        pods=pods,
        cpus=max(1, ceil(round(sum(bundle.cpus for bundle in inside), 6))),
        gpus=sum(bundle.gpus for bundle in inside),
        memory=sum(bundle.memory for bundle in inside),
        actors=tuple(Counter(bundle.owner for bundle in inside).items()),
    )


def _divisor(count: int, room: int) -> int:
    """The most of `count` that fit into `room`, and that all pods can have alike."""
    return next(size for size in range(min(count, room), 0, -1) if count % size == 0)


def _share(bundles: list[Bundle], pods: int) -> list[Bundle]:
    return bundles[: ceil(len(bundles) / pods)]
