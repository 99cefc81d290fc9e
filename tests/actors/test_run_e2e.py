"""The whole stack by its command: Ray, Megatron ranks, bridge, vLLM engines, rewards, checkpoint."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.data import int_row
from tests.actors.engine_helpers import reference_greedy
from tests.actors.run_helpers import Finished, Running, make_workspace, rows, start

pytestmark = pytest.mark.e2e

LAYOUTS = {
    "tensor": [
        *("--tensor_model_parallel_size", "2", "--sequence_parallel", "true"),
        *("--save_steps", "1", "--max_shard_size", "100KB"),
    ],
    "pipeline": [
        *("--tensor_model_parallel_size", "1", "--pipeline_model_parallel_size", "2", "--beta", "0.1"),
    ],
    # One of its engines is killed on the way.
    "experts": [
        *("--tensor_model_parallel_size", "1", "--data_parallel_size", "2", "--num_engines", "2"),
        *("--expert_model_parallel_size", "2", "--steps_per_generation", "2"),
    ],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_workspace(folder / "of-experts", "moe")
    return make_workspace(folder)


def model_of(workspace: Path, name: str) -> Path:
    return workspace / ("of-experts/model" if name == "experts" else "model")


@pytest.fixture(scope="module")
def runs(workspace: Path) -> dict[str, Finished]:
    """One after the other: two cores."""
    found: dict[str, Finished] = {}
    for name, arguments in LAYOUTS.items():
        running = start(
            *("grpo", "--config", str(workspace / "grpo.yaml"), "--output_dir", str(workspace / name)),
            *("--model.model", str(model_of(workspace, name)), *arguments),
        )
        if name == "experts":
            kill_an_engine(running, workspace / name / "metrics.jsonl")
        found[name] = running.finish()
    return found


def kill_an_engine(running: Running, metrics: Path) -> None:
    """After the first step, with SIGKILL; what comes after has to be as if nothing had been."""
    while running.process.poll() is None:
        # Not row by row: the last line may be half written.
        if metrics.is_file() and '"loss"' in metrics.read_text():
            os.kill(running.pids("ray::Engine")[0], signal.SIGKILL)
            return
        time.sleep(0.05)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_ends_with_its_result_and_leaves_no_process(
    runs: dict[str, Finished], workspace: Path, name: str
) -> None:
    finished = runs[name]
    assert finished.code == 0, finished.err
    assert finished.left == []
    result = finished.result()
    directory = workspace / name
    assert result["checkpoint"] == str(directory / "checkpoint")
    assert Path(result["curve"]).read_bytes().startswith(b"\x89PNG")
    assert list((directory / "tensorboard").glob("events.*"))
    assert (directory / "config.yaml").is_file()
    assert result["accuracy_after"] == pytest.approx(
        np.mean([row["reward"] for row in rows(directory / "rollouts.jsonl") if _is_last_eval(row)])
    )


def _is_last_eval(row: dict[str, Any]) -> bool:
    return row["split"] == "eval" and row["step"] == 3


@pytest.mark.parametrize("name", LAYOUTS)
def test_after_every_sync_the_engine_computes_what_the_trainer_computes(
    runs: dict[str, Finished], workspace: Path, name: str
) -> None:
    """A stale, misplaced or half-loaded tensor would show as a mismatch of log-probabilities."""
    assert runs[name].code == 0, runs[name].err
    steps = [row for row in rows(workspace / name / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row["sync/buckets"] > 3
        assert row["grad_norm"] > 0
        # With two optimizer steps per generation the old log-probabilities are the comparable ones too.
        assert row["sampling/logprob_difference_mean"] < 1e-5
    assert any(row["reward"] != steps[0]["reward"] for row in steps[1:])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_engines_greedy_texts_after_the_last_sync_are_transformers_of_the_checkpoint(
    runs: dict[str, Finished], workspace: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert runs[name].code == 0
    checkpoint = workspace / name / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    last = [row for row in rows(workspace / name / "rollouts.jsonl") if _is_last_eval(row)]
    assert len(last) == 6
    for row in last:
        tokens = int_row(tokenizer(row["messages"][-1]["content"])["input_ids"])
        expected = reference_greedy(model, tokens, 10)
        # An engine's text goes on from the prompt, so it begins with the space between two words.
        assert row["completion"].split() == tokenizer.decode(expected, skip_special_tokens=True).split()
        assert row["weight_versions"] == [3, 3]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def test_the_run_that_lost_an_engine_says_so(runs: dict[str, Finished]) -> None:
    assert "is lost" in runs["experts"].err
    assert "is lost" not in runs["tensor"].err


def test_weights_did_change(runs: dict[str, Finished], workspace: Path) -> None:
    for name in runs:
        before = tensors(model_of(workspace, name))
        after = tensors(workspace / name / "checkpoint")
        assert after.keys() == before.keys()
        assert all(not torch.equal(after[key], before[key]) for key in before)


def test_checkpoints_on_the_way_are_of_their_steps_and_in_files_of_the_asked_size(
    runs: dict[str, Finished], workspace: Path
) -> None:
    assert runs["tensor"].code == 0
    folder = workspace / "tensor"
    found = sorted(path.name for path in folder.glob("checkpoint*"))
    assert found == ["checkpoint", "checkpoint-1", "checkpoint-2"]
    first, second, last = (tensors(folder / name) for name in ("checkpoint-1", "checkpoint-2", "checkpoint"))
    for one, other in ((first, second), (second, last), (first, tensors(workspace / "model"))):
        assert one.keys() == other.keys()
        assert any(not torch.equal(one[key], other[key]) for key in one)
    files = list((folder / "checkpoint").glob("*.safetensors"))
    assert len(files) > 3
    largest = max(tensor.nbytes for tensor in last.values())
    assert max(path.stat().st_size for path in files) < max(100_000, largest) + 10_000


def test_the_kl_to_the_reference_is_zero_before_the_first_step_and_then_not(
    runs: dict[str, Finished], workspace: Path
) -> None:
    assert runs["pipeline"].code == 0
    kl = [row["kl"] for row in rows(workspace / "pipeline" / "metrics.jsonl") if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[1] > 1e-4
