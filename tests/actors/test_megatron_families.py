"""Every family under many layouts: one optimizer step and the logits, against transformers.

The numbers are measured by megatron_families_worker.py, once per number of processes; here they are judged.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.actors.megatron_families_layouts import BFLOAT16, READS, STEPS, world_size
from tests.actors.megatron_processes import RunWorkers

pytestmark = pytest.mark.megatron
LR = 1e-2
"""The worker's (megatron_worker_reference)."""
pytest_plugins = ("tests.actors.megatron_fixtures",)

WORKER = Path(__file__).with_name("megatron_families_worker.py")
STEP_CASES = [f"{layout}/{family}" for layout, families in STEPS.items() for family in families]
READ_CASES = [f"{layout}/{family}/read" for layout, families in READS.items() for family in families]

Results = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, run_workers: RunWorkers) -> Results:
    """A case's results, one per rank; starts the processes of its layout when first asked."""
    finished: dict[int, list[dict[str, Any]]] = {}

    def of_case(case: str) -> list[Any]:
        size = world_size(case.split("/", maxsplit=1)[0])
        if size not in finished:
            finished[size] = []
            finished[size] = run_workers(WORKER, size, tmp_path_factory.mktemp("families"), timeout_s=300)
        assert finished[size], "the processes of this layout have failed before"
        return [rank[case] for rank in finished[size]]

    return of_case


@pytest.mark.parametrize("case", STEP_CASES)
def test_a_step_equals_transformers_and_torch_adamw(case: str, results: Results) -> None:
    measured = results(case)
    assert any(rank["logprobs"] is not None for rank in measured)
    for rank in measured:
        assert rank["logprobs"] is None or rank["logprobs"] < 1e-5
        assert rank["loss"] < 1e-5
        assert rank["grad_norm"] < 1e-5
        if "-split" not in case:
            assert rank["grads"][0] < 2e-5, rank["grads"][1]
        assert rank["weights"][0] < 1e-5, rank["weights"][1]


@pytest.mark.parametrize("case", READ_CASES)
def test_logits_equal_those_of_transformers(case: str, results: Results) -> None:
    errors = [rank["logits"] for rank in results(case) if rank["logits"] is not None]
    assert errors
    assert max(errors) < 1e-5


def test_layers_for_multi_token_prediction_are_on_the_last_stage(results: Results) -> None:
    (shapes,) = [rank["mtp"] for rank in results("one/deepseek_v3/read")]
    assert shapes["mtp.layers.0.eh_proj.weight"] == [24, 48]
    assert shapes["mtp.layers.0.enorm.weight"] == [24]
    assert shapes["mtp.layers.0.hnorm.weight"] == [24]
    assert shapes["mtp.layers.0.final_layernorm.weight"] == [24]
    assert shapes["mtp.layers.0.transformer_layer.self_attention.linear_kv_down_proj.weight"] == [14, 24]
    assert shapes["mtp.layers.0.transformer_layer.mlp.router.weight"] == [12, 24]
    first, last = (rank["mtp"] for rank in results("pp2-vpp2-layout-mtp/deepseek_v3/read"))
    assert not first
    assert last == shapes


def test_multi_token_prediction_equals_the_formula(results: Results) -> None:
    (rank,) = results("one/mtp")
    assert rank["output"] < 1e-5


def test_parts_of_a_model_that_sees_are_trained_at_their_rates_or_not_at_all(results: Results) -> None:
    """A step of Adam with fresh moments is about as long as the learning rate."""
    (rates,), (aligner,), (default,) = (results(f"one/{name}") for name in ("rates", "aligner", "default"))
    assert rates["llm"] == pytest.approx(LR, rel=0.1)
    assert rates["vit"] == pytest.approx(1e-4, rel=0.1)
    assert rates["aligner"] == pytest.approx(4e-4, rel=0.1)
    assert (aligner["llm"], aligner["vit"]) == (0, 0)
    assert aligner["aligner"] == pytest.approx(LR, rel=0.1)
    assert (default["vit"], default["aligner"]) == (0, 0)
    assert default["llm"] == pytest.approx(LR, rel=0.1)


@pytest.mark.parametrize("family", BFLOAT16)
def test_bfloat16_is_near_float32(family: str, results: Results) -> None:
    (rank,) = results(f"one/{family}/bfloat16")
    assert rank["loss"] < 2e-2
    assert rank["grad_norm"] < 5e-2
    assert set(rank["biases"]) <= {"torch.float32"}


def test_names_in_distributed_checkpoints_are_those_of_transformer_engine(results: Results) -> None:
    """As megatron.core.models.gpt.gpt_layer_specs has them with Transformer Engine."""

    def keys(family: str) -> set[str]:
        (found,) = results(f"one/{family}/keys")
        return set(found)

    layer = "decoder.layers."
    dense, experts = keys("qwen3"), keys("mixtral")
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        assert f"{layer}{name}.layer_norm_weight" in dense
    assert f"{layer}self_attention.linear_qkv.layer_norm_weight" in experts
    assert f"{layer}pre_mlp_layernorm.weight" in experts
    assert f"{layer}mlp.experts.experts.linear_fc1.weight" in experts
    assert not any("input_layernorm" in key for key in dense | experts)
    assert f"{layer}mlp.post_layernorm.weight" in keys("glm4")
    assert f"{layer}self_attention.post_layernorm.weight" in keys("glm4")
    assert f"{layer}self_attention.core_attention.softmax_offset" in keys("gpt_oss")
    latent = keys("deepseek_v3")
    for name in (
        "0.input_layernorm.weight",
        "0.mlp.linear_fc1.layer_norm_weight",
        "0.self_attention.linear_q_up_proj.layer_norm_weight",
        "0.self_attention.linear_kv_up_proj.layer_norm_weight",
        "1.pre_mlp_layernorm.weight",
        "1.mlp.router.expert_bias",
    ):
        assert layer + name in latent
    mixed = keys("qwen3_moe")
    assert layer + "0.pre_mlp_layernorm.weight" in mixed
    assert layer + "1.mlp.linear_fc1.layer_norm_weight" in mixed
