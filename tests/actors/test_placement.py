"""Reservations in a real local Ray of four CPUs."""

import pytest
import ray
from ray.util.placement_group import remove_placement_group

from actors.placement import Bundle, bundles_of, describe, reserve
from configs.errors import BasculeError
from configs.schema import RunConfig

pytestmark = pytest.mark.e2e
pytest_plugins = ("tests.actors.engine_fixtures",)


def bundle(owner: str = "trainer", cpus: float = 0.5, memory: int = 1 << 20) -> Bundle:
    return Bundle(owner=owner, cpus=cpus, gpus=0, memory=memory)


def test_actors_land_in_their_own_bundle(ray_cluster: str) -> None:
    reservation = reserve([bundle(), bundle("engine"), bundle()], timeout_s=60, can_grow=False)
    assert reservation.indices("trainer") == [0, 2]

    @ray.remote
    class Probe:
        def bundle(self) -> object:
            return ray.util.get_current_placement_group()

    probes = [Probe.options(**reservation.options("trainer", number)).remote() for number in (0, 1)]
    groups = ray.get([probe.bundle.remote() for probe in probes], timeout=60)
    assert [group.id for group in groups] == [reservation.group.id] * 2
    for probe in probes:
        ray.kill(probe)
    remove_placement_group(reservation.group)


def test_what_can_never_fit_is_refused_at_once(ray_cluster: str) -> None:
    with pytest.raises(BasculeError, match=r"asks for 100 CPU.*there are 4 CPU") as caught:
        reserve([bundle(cpus=50)] * 2, timeout_s=60, can_grow=False)
    assert "2 x trainer: 50 CPU" in str(caught.value)
    with pytest.raises(BasculeError, match=r"1048576\.0 GiB memory; there are .* GiB"):
        reserve([bundle(memory=1 << 50)], timeout_s=60, can_grow=False)


def test_a_cluster_that_can_grow_is_waited_for_and_not_longer(ray_cluster: str) -> None:
    with pytest.raises(BasculeError, match="does not fit into the cluster after 1 s"):
        reserve([bundle(cpus=50)], timeout_s=1, can_grow=True)


def config(**sections: object) -> RunConfig:
    base = {"model": {"model": "m"}, "data": {"dataset": "d"}, "rewards": [{"function": "r"}]}
    return RunConfig.model_validate({**base, **sections})


def test_memory_is_what_the_parts_need_written_out() -> None:
    parameters, gib = 1_000_000_000, 1 << 30
    bundles = bundles_of(
        config(
            model={"model": "m", "torch_dtype": "bfloat16"},
            trainer={"tensor_model_parallel_size": 2, "data_parallel_size": 2},
            grpo={"beta": 0.1},
            rollout={"kv_cache_memory_bytes": gib, "num_engines": 2},
        ),
        parameters,
        "cpu",
    )
    owners = [each.owner for each in bundles]
    assert owners == ["trainer"] * 4 + ["engine"] * 2 + ["bridge", "reward"]
    # Half the parameters: 2 bytes, 4 of gradient, half of 12 of optimizer state; 2 more for the reference.
    assert bundles[0].memory == gib + parameters // 2 * (2 + 4 + 6 + 2)
    assert bundles[4].memory == gib + gib // 2 + parameters * 2 * 2 + gib
    assert "4 x trainer" in describe(bundles)


def test_experts_are_shared_by_their_own_ranks_written_out() -> None:
    gib = 1 << 30
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "data_parallel_size": 4}
    layout |= {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    bundles = bundles_of(config(algorithm="sft", trainer=layout), 1_000_000, "cpu", in_experts=800_000)
    assert len(bundles) == 8
    # Two of eight ranks share what is outside of experts, so 4 split its optimizer state; four share the
    # experts, so 2 split theirs.
    dense, experts = 200_000 // 2, 800_000 // 4
    assert bundles[0].memory == gib + dense * 6 + dense * 12 // 4 + experts * 6 + experts * 12 // 2


def test_sft_reserves_trainers_only_and_cuda_asks_for_gpus() -> None:
    bundles = bundles_of(config(algorithm="sft"), 1000, "cuda")
    assert [(each.owner, each.gpus) for each in bundles] == [("trainer", 1)]
