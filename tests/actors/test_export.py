"""`bascule export` and training from and to torch_dist, by their commands, on a mixture-of-experts model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.actors.run_helpers import Finished, make_workspace, rows, run

pytestmark = pytest.mark.e2e

EXPERTS = (
    *("--tensor_model_parallel_size", "2", "--sequence_parallel", "true"),
    *("--expert_model_parallel_size", "2", "--expert_tensor_parallel_size", "1"),
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("export"), family="moe")


@pytest.fixture(scope="module")
def to_mcore(workspace: Path) -> Finished:
    return run(
        *("export", "--model", str(workspace / "model"), "--to_mcore", "true"),
        *("--output_dir", str(workspace / "mcore"), "--test_convert_precision", "true", *EXPERTS),
    )


@pytest.fixture(scope="module")
def to_hf(workspace: Path, to_mcore: Finished) -> Finished:
    """Under another layout, into small files; no float is as close as this threshold asks."""
    assert to_mcore.code == 0, to_mcore.err
    return run(
        *("export", "--mcore_model", str(workspace / "mcore"), "--to_hf", "true"),
        *("--output_dir", str(workspace / "back"), "--pipeline_model_parallel_size", "2"),
        *("--max_shard_size", "100KB", "--test_convert_precision", "true", "--precision_threshold", "1e-12"),
    )


@pytest.fixture(scope="module")
def trained(workspace: Path, to_mcore: Finished) -> Finished:
    """GRPO with weights and reference from torch_dist, saved as torch_dist."""
    assert to_mcore.code == 0, to_mcore.err
    return run(
        *("grpo", "--config", str(workspace / "grpo.yaml"), "--output_dir", str(workspace / "run")),
        *("--model.model", "null", "--model.mcore_model", str(workspace / "mcore")),
        *("--mcore_ref_model", str(workspace / "mcore"), "--beta", "0.1", "--max_steps", "2"),
        *("--save_steps", "1", "--save_safetensors", "false", *EXPERTS),
    )


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def test_to_mcore_passes_its_precision_test_and_leaves_no_process(
    workspace: Path, to_mcore: Finished
) -> None:
    assert to_mcore.code == 0, to_mcore.err
    assert to_mcore.left == []
    count = len(tensors(workspace / "model"))
    assert f"round trip: {count} of {count} tensors are the same bit for bit" in to_mcore.out
    assert "token_diff: 0 of" in to_mcore.out
    assert "precision test passed" in to_mcore.out
    assert not (workspace / "mcore.partial").exists()


def test_back_in_safetensors_every_byte_is_the_sources(workspace: Path, to_hf: Finished) -> None:
    before, after = tensors(workspace / "model"), tensors(workspace / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    assert len(list((workspace / "back").glob("*.safetensors"))) > 3
    assert not list((workspace / "back").glob("bascule.json"))


def test_the_threshold_decides_the_exit_code(to_hf: Finished) -> None:
    assert to_hf.code == 1
    assert "precision test FAILED (threshold 1e-12)" in to_hf.out
    assert to_hf.result()["passed"] is False


def test_engines_and_reference_start_with_the_weights_of_the_torch_dist_checkpoint(
    workspace: Path, trained: Finished
) -> None:
    assert trained.code == 0, trained.err
    steps = [row for row in rows(workspace / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["sampling/logprob_difference_mean"] < 1e-5
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert steps[1]["kl"] > 1e-5


def test_a_torch_dist_checkpoint_of_a_run_becomes_a_model_that_transformers_runs(
    workspace: Path, trained: Finished
) -> None:
    assert (workspace / "run" / "checkpoint-1" / "iter_0000001" / "metadata.json").is_file()
    finished = run(
        *("export", "--mcore_model", str(workspace / "run" / "checkpoint"), "--to_hf", "true"),
        *("--output_dir", str(workspace / "trained"), "--test_convert_precision", "true"),
    )
    assert finished.code == 0, finished.err + finished.out
    before, after = tensors(workspace / "model"), tensors(workspace / "trained")
    assert before.keys() == after.keys()
    assert sum(torch.equal(after[name], before[name]) for name in before) < len(before) / 2


def test_wrong_input_is_refused_before_anything_starts(workspace: Path, to_mcore: Finished) -> None:
    model = str(workspace / "model")
    output = str(workspace / "model")
    finished = run("export", "--model", model, "--to_mcore", "true", "--output_dir", output)
    assert finished.code == 2
    assert "is model itself, which is never replaced" in finished.err
    finished = run(
        *("export", "--mcore_model", str(workspace / "mcore"), "--to_hf", "true", "--exist_ok", "true"),
        *("--output_dir", str(workspace / "mcore" / "iter_0000001")),
    )
    assert finished.code == 2
    assert "is what mcore_model is read from, which is never replaced" in finished.err
    finished = run(
        *("export", "--model", model, "--to_mcore", "true", "--output_dir", str(workspace / "x")),
        *("--expert_model_parallel_size", "3"),
    )
    assert finished.code == 2
    assert "expert_model_parallel_size 3" in finished.err
