"""Reservations in a real local Ray of four CPUs, and the memory that is asked for."""

from pathlib import Path

import pytest
import ray
import torch
from ray.util.placement_group import remove_placement_group
from safetensors.torch import save_file

from actors.model_source import ModelSize, ModelSource, model_size, tensors_of
from actors.placement import Bundle, bundles_of, describe, export_bundles, reserve
from configs.errors import BasculeError
from configs.export import ExportConfig
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


def test_nodes_without_the_label_are_nobodys_and_the_message_says_so(ray_cluster: str) -> None:
    with pytest.raises(BasculeError) as caught:
        reserve([bundle(), bundle("reward")], timeout_s=1, can_grow=True, node_label="role")
    assert "nodes with role = rollout, trainer are needed; those that there are have (none)" in str(
        caught.value
    )


def test_an_actor_belongs_on_its_own_nodes_or_beside_the_engines() -> None:
    owners = ("trainer", "engine", "bridge", "reward", "environment")
    assert [bundle(owner).nodes for owner in owners] == ["trainer", "rollout", "bridge", "rollout", "rollout"]


def config(**sections: object) -> RunConfig:
    base = {"model": {"model": "m"}, "data": {"dataset": "d"}, "rewards": [{"function": "r"}]}
    return RunConfig.model_validate({**base, **sections})


def size(parameters: int, experts: int = 0, nbytes: int = 0) -> ModelSize:
    return ModelSize(num_parameters=parameters, num_in_experts=experts, nbytes=nbytes)


def test_memory_is_what_the_parts_need_written_out() -> None:
    parameters, gib = 1_000_000_000, 1 << 30
    bundles = bundles_of(
        config(
            model={"model": "m", "torch_dtype": "bfloat16"},
            trainer={"tensor_model_parallel_size": 2, "data_parallel_size": 2},
            grpo={"beta": 0.1},
            rollout={"kv_cache_memory_bytes": gib, "num_engines": 2},
        ),
        size(parameters),
        "cpu",
    )
    owners = [each.owner for each in bundles]
    assert owners == ["trainer"] * 4 + ["engine"] * 2 + ["bridge"] + ["reward"] * 2
    # Half the parameters: 2 bytes, 4 of gradient, half of 12 of optimizer state; 2 more for the reference; and the
    # copy of weights and optimizer state that is written.
    assert bundles[0].memory == gib + parameters // 2 * (2 + 4 + 6 + 2 + (2 + 6))
    assert bundles[4].memory == gib + gib // 2 + parameters * 2 * 2 + gib
    # Two buckets of 64 MiB.
    assert bundles[6].memory == gib // 2 + 2 * (64 << 20)
    assert "4 x trainer" in describe(bundles)


def test_with_lora_a_reference_of_its_own_is_counted_and_the_policy_without_adapters_is_not() -> None:
    parameters = 1_000_000

    def memory(beta: float = 0.1, model: str | None = None, **tuner: object) -> int:
        sections: dict[str, object] = {
            "model": {"model": "m", "ref_model": model},
            "grpo": {"beta": beta},
            "tuner": {"tuner_type": "lora", **tuner},
        }
        return bundles_of(config(**sections), size(parameters), "cpu")[0].memory

    alone = memory(beta=0)
    # bfloat16 weights, and a quarter of that for what adapters need.
    assert alone == (1 << 30) + parameters * 2 * 5 // 4
    assert memory() == alone
    for others in ({"model": "r"}, {"ref_adapters": "a"}, {"modules_to_save": ["lm_head"]}):
        assert memory(**others) == alone + parameters * 2  # pyright: ignore[reportArgumentType]


def test_a_bridge_that_keeps_a_version_holds_all_of_it_in_its_own_bundle_or_in_rank_0() -> None:
    parameters = 1_000_000
    plain = bundles_of(config(), size(parameters), "cpu")
    kept = bundles_of(config(bridge={"offload_bridge": True}), size(parameters), "cpu")
    assert kept[-3].owner == "bridge"
    assert kept[-3].memory == (1 << 29) + parameters * 2  # bfloat16
    hosted = bundles_of(
        config(bridge={"offload_bridge": True, "placement": "trainer"}), size(parameters), "cpu"
    )
    assert [each.owner for each in hosted] == [each.owner for each in plain if each.owner != "bridge"]
    assert hosted[0].memory == plain[0].memory + parameters * 2


def test_an_engine_of_two_workers_asks_for_two_of_each() -> None:
    one = bundles_of(config(), size(1000), "cuda")[1]
    two = bundles_of(config(rollout={"tensor_parallel_size": 2}), size(1000), "cuda")[1]
    assert (two.owner, two.cpus, two.gpus) == ("engine", 2 * one.cpus, 2)
    assert two.memory == one.memory + (1 << 30)


def test_a_teacher_is_in_the_trainer_ranks_or_in_bundles_of_its_own() -> None:
    def bundles(**teacher: object) -> tuple[Bundle, ...]:
        run = config(
            algorithm="gkd",
            model={"model": "m", "teacher_model": "t"},
            gkd={"lmbda": 0, "gkd_logits_topk": 8},
            teacher=teacher,
        )
        return bundles_of(run, size(1000), "cuda", size(1_000_000))

    (inside,) = bundles()
    engine = {"num_engines": 2, "tensor_parallel_size": 4}
    trainer, *teachers = bundles(teacher_backend="engine", engine=engine)
    assert inside.memory == trainer.memory + 2 * 1_000_000
    # bfloat16, once more while it is loaded, and four processes.
    memory = 4 * (1 << 30) + (1 << 29) + 2 * 2 * 1_000_000
    assert teachers == [Bundle(owner="teacher", cpus=2.0, gpus=4, memory=memory)] * 2


def test_experts_are_shared_by_their_own_ranks_written_out() -> None:
    gib = 1 << 30
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "data_parallel_size": 4}
    layout |= {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}
    bundles = bundles_of(config(algorithm="sft", trainer=layout), size(1_000_000, 800_000), "cpu")
    assert len(bundles) == 8
    # Two of eight ranks share what is outside of experts, so 4 split its optimizer state; four share the
    # experts, so 2 split theirs.
    dense, experts = 200_000 // 2, 800_000 // 4
    # The copy of a state that is written has weights and optimizer state once more.
    written = dense * 2 + dense * 12 // 4 + experts * 2 + experts * 12 // 2
    expected = gib + dense * 6 + dense * 12 // 4 + experts * 6 + experts * 12 // 2
    assert bundles[0].memory == expected + written
    never = config(algorithm="sft", trainer=layout, checkpoint={"resume_steps": 0})
    assert bundles_of(never, size(1_000_000, 800_000), "cpu")[0].memory == expected


def test_the_size_of_a_model_is_counted_in_its_headers(tmp_path: Path) -> None:
    prefix = "model.layers.0.mlp."
    tensors = {
        "model.embed_tokens.weight": torch.zeros(20, 4, dtype=torch.bfloat16),
        prefix + "experts.0.up_proj.weight": torch.zeros(8, 4, dtype=torch.bfloat16),
        prefix + "experts.1.up_proj.weight": torch.zeros(8, 4, dtype=torch.bfloat16),
        prefix + "shared_experts.up_proj.weight": torch.zeros(6, 4, dtype=torch.bfloat16),
        prefix + "gate.e_score_correction_bias": torch.zeros(2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = ModelSource(directory=tmp_path)
    assert model_size(source, tensors_of(source)) == size(80 + 64 + 24 + 2, 64, 168 * 2 + 2 * 4)


def test_without_a_list_of_tensors_the_files_of_a_torch_dist_checkpoint_are_counted(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text("{}")
    for name, nbytes in (("__0_0.distcp", 600), ("__1_0.distcp", 400), ("common.pt", 99)):
        (tmp_path / name).write_bytes(bytes(nbytes))
    source = ModelSource(directory=tmp_path, mcore=tmp_path)
    assert model_size(source, tensors_of(source)) == size(500, nbytes=1000)


@pytest.mark.parametrize(
    ("torch_dtype", "item"), [(None, 3), ("bfloat16", 2), ("float16", 2), ("float32", 4)]
)
def test_an_export_rank_holds_its_share_in_the_type_asked_for(torch_dtype: str | None, item: int) -> None:
    values = {"model": "m", "to_mcore": True, "output_dir": "o", "torch_dtype": torch_dtype}
    layout = {"pipeline_model_parallel_size": 2, "data_parallel_size": 2, "expert_model_parallel_size": 2}
    bundles = export_bundles(
        ExportConfig.model_validate({**values, "layout": layout}),
        size(1_000_000, 800_000, nbytes=3_000_000),
        "cpu",
    )
    # Two stages share everything, and two ranks of each the experts.
    assert [each.memory for each in bundles] == [(1 << 30) + (100_000 + 200_000) * item] * 4


def test_sft_reserves_trainers_only_and_cuda_asks_for_gpus() -> None:
    bundles = bundles_of(config(algorithm="sft"), size(1000), "cuda")
    assert [(each.owner, each.gpus) for each in bundles] == [("trainer", 1)]
