"""torch_dist checkpoints between layouts, against transformers and torch.optim, and Megatron's own reader.

The numbers are measured by two workers (dense models, models with experts): by two processes of each, then by
one that loads what the two have saved.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.actors.megatron_processes import RunWorkers, log_of

pytestmark = pytest.mark.megatron
pytest_plugins = ("tests.actors.megatron_fixtures",)

DENSE = "megatron_checkpoint_worker.py"
EXPERTS = "megatron_checkpoint_experts_worker.py"
TWO = ("tp2-sp", "pp2", "dp2")
FAMILIES = ("llama", "qwen3")
CASES = [f"{family}/{saved}/{loaded}" for family in FAMILIES for saved in TWO for loaded in (*TWO, "one")]
LAYERS = "decoder.layers."
KEYS = {
    "decoder.final_layernorm.weight",
    "embedding.word_embeddings.weight",
    LAYERS + "mlp.linear_fc1.weight",
    LAYERS + "mlp.linear_fc2.weight",
    LAYERS + "self_attention.linear_proj.weight",
    LAYERS + "self_attention.linear_qkv.weight",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, run_workers: RunWorkers) -> list[dict[str, Any]]:
    """What each of the three processes measured, by case."""
    return run_both(run_workers, DENSE, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, run_workers: RunWorkers) -> list[dict[str, Any]]:
    """The same of the models with experts."""
    return run_both(run_workers, EXPERTS, tmp_path_factory.mktemp("experts"))


def run_both(run_workers: RunWorkers, worker: str, directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for world_size in (2, 1):
        prefix = f"{world_size}-"
        found += run_workers(Path(__file__).with_name(worker), world_size, directory, prefix=prefix)
        for rank in range(world_size):
            assert "data corruption" not in log_of(directory, rank, prefix).read_text()
    return found


def of_case(results: list[dict[str, Any]], case: str) -> list[Any]:
    found = [rank[case] for rank in results if case in rank]
    assert found
    return found


# Tied embeddings (qwen3) under pipeline parallelism are where Megatron's own layout of the state goes wrong.
@pytest.mark.parametrize("case", [*CASES, *(f"whole/pp2/{loaded}" for loaded in TWO)])
def test_training_goes_on_under_another_layout(case: str, results: list[dict[str, Any]]) -> None:
    for rank in of_case(results, case):
        assert rank["iteration"] == 1
        assert rank["done"] == 1
        assert rank["weights"] < 1e-6
        assert rank["next"] < 2e-6


@pytest.mark.parametrize("loaded", ["tp2-sp-ep2", "ep2-split", "pp2-vpp2", "one"])
@pytest.mark.parametrize("saved", ["ep2-split", "pp2-vpp2"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_experts_go_on_with_and_without_expert_parallelism(
    family: str, saved: str, loaded: str, experts: list[dict[str, Any]]
) -> None:
    for rank in of_case(experts, f"{family}/{saved}/{loaded}"):
        assert rank["weights"][0] < 2e-6, rank["weights"]
        assert rank["bias"] == 0
        assert rank["next"][0] < 2e-6, rank["next"]


@pytest.mark.parametrize("layout", ["tp2-sp-ep2", "one"])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_layers_for_multi_token_prediction_come_back_where_the_checkpoint_has_them(
    family: str, layout: str, experts: list[dict[str, Any]]
) -> None:
    for rank in of_case(experts, f"mtp/{family}/whole/{layout}"):
        assert rank["with_mtp"]
        assert rank["listed"]
        assert rank["missing"] == rank["extra"] == rank["differ"] == []
    for rank in of_case(experts, f"mtp/{family}/without/{layout}"):
        assert not rank["with_mtp"]
        assert rank["listed"]
        assert rank["extra"] == rank["differ"] == []
        # The model has layers 0 and 1; those for multi-token prediction follow.
        assert rank["missing"] == [name for name in rank["all"] if name.startswith("model.layers.2.")]
        assert len(rank["missing"]) > 10


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_model_without_these_layers_loads_when_told_to_ignore_them(
    family: str, experts: list[dict[str, Any]]
) -> None:
    for rank in of_case(experts, f"mtp/{family}"):
        lines = rank["said"].splitlines()[1:]
        assert lines
        assert all(line.startswith("  unexpected: mtp.layers") for line in lines)


def test_a_checkpoint_is_visible_only_with_the_files_beside_it(experts: list[dict[str, Any]]) -> None:
    first, second = of_case(experts, "mtp/deepseek_v3")
    assert [first["visible"], second["visible"]] == [[False], []]
    for rank in (first, second):
        said, left = rank["no_files"]
        assert "the files beside the checkpoint could not be written: OSError('no space')" in said
        assert left == []


def test_a_full_disk_leaves_nothing_and_names_the_file(experts: list[dict[str, Any]]) -> None:
    for rank in of_case(experts, "mtp/deepseek_v3"):
        said, left = rank["full_disk"]
        assert "full/iter_0000001.bascule-partial: the checkpoint could not be written" in said
        assert "rank 0: Worker failure: [Errno 27] File too large" in said
        assert "Traceback" not in said
        assert left == []


def test_what_is_not_finite_in_a_torch_dist_checkpoint_is_named(experts: list[dict[str, Any]]) -> None:
    for rank in of_case(experts, "mtp/deepseek_v3"):
        assert rank["not_finite"] == [
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.1.mlp.gate.e_score_correction_bias",
        ]


@pytest.mark.parametrize("saved", TWO)
@pytest.mark.parametrize("family", FAMILIES)
def test_megatrons_reader_finds_whole_tensors_by_megatrons_names(
    family: str, saved: str, results: list[dict[str, Any]]
) -> None:
    (found,) = of_case(results, f"plain/{family}/{saved}")
    assert max(found["stacked"], found["fc1"], found["embedding"]) < 1e-6
    assert set(found["keys"]) >= KEYS
    assert ("output_layer.weight" in found["keys"]) == (family == "llama")


def test_a_loaded_bfloat16_model_goes_on_bit_for_bit(results: list[dict[str, Any]]) -> None:
    for rank in of_case(results, "bf16"):
        assert rank["iteration"] == 7
        assert rank["same"]
        assert rank["losses"][:2] == rank["losses"][2:]
        assert rank["losses"][0] != rank["losses"][1]


def test_weights_alone_and_a_release(results: list[dict[str, Any]]) -> None:
    for rank in of_case(results, "weights"):
        assert rank["error"] < 1e-6
        assert rank["again"] < 1e-6
        assert "iter_0000003 has no optimizer state" in rank["no_state"]
        assert rank["left"] == ["latest_checkpointed_iteration.txt", "release"]


def test_what_does_not_fit_is_listed_before_a_parameter_changes(results: list[dict[str, Any]]) -> None:
    for rank in of_case(results, "refusals"):
        assert rank["kept"]
        other = rank["other"].splitlines()
        assert "does not fit the model" in other[0]
        assert "  missing: output_layer.weight [131, 32]" in other
        assert f"  unexpected: {LAYERS}self_attention.q_layernorm.weight [2, 16]" in other
        assert (
            f"  {LAYERS}self_attention.linear_proj.weight is [2, 32, 64] in the checkpoint, "
            "[2, 32, 32] in the model"
        ) in other
        assert len(other) == 6


def test_damage_is_named(results: list[dict[str, Any]]) -> None:
    for rank in of_case(results, "refusals"):
        assert "is not a Megatron checkpoint" in rank["nothing"]
        assert "__0_0.distcp is truncated" in rank["truncated"]
        assert ".metadata" in rank["metadata"]
        assert "damaged" in rank["metadata"]
        assert "blocked/iter_0000001.bascule-partial cannot be created" in rank["unwritable"]
