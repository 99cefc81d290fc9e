"""The whole stack by its command: Ray, Megatron ranks, bridge, vLLM engine, rewards, checkpoint.

A mixture of experts on two engines, one of which dies, is in test_export.py: it comes from torch_dist and goes
there.
"""

import hashlib
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.cli import main
from actors.reward_swap import post_request, read_answer, read_rewards
from algorithms.rewards.loading import read_sources
from tests.actors.run_helpers import (
    Finished,
    assert_texts_are_transformers,
    evaluated,
    make_workspace,
    rows,
    start,
    with_secrets,
)
from tests.actors.trace_helpers import read_trace

pytestmark = pytest.mark.e2e

_PHASES = ("step 1", "step 2", "step 3", "generate", "sync", "evaluate")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def finished(workspace: Path) -> Finished:
    """A run on tensor and pipeline parallel ranks that writes every version, and whose reward is replaced."""
    running = start(
        *("grpo", "--config", str(workspace / "grpo.yaml"), "--output_dir", str(workspace / "out")),
        *("--tensor_model_parallel_size", "2", "--sequence_parallel", "true"),
        *("--pipeline_model_parallel_size", "2", "--steps_per_generation", "2"),
        *("--save_steps", "1", "--max_shard_size", "100KB"),
    )
    directory = workspace / "out"
    while not (directory / "rewards.yaml").exists() and running.process.poll() is None:
        time.sleep(0.05)
    if running.process.poll() is None:
        (reward,) = read_rewards(directory)
        again = reward.model_copy(update={"name": "again"})
        post_request(directory, read_sources([again]), "1")
    return running.finish()


def test_the_reward_was_replaced_between_two_steps(finished: Finished, workspace: Path) -> None:
    assert finished.code == 0, finished.err
    directory = workspace / "out"
    step = read_answer(directory, "1")
    assert step in (1, 2, 3)
    (event,) = [row for row in rows(directory / "events.jsonl") if row["kind"] == "reward"]
    digest = hashlib.sha256((workspace / "rewards.py").read_bytes()).hexdigest()
    assert (event["step"], event["sources"]) == (step, {"again": digest})
    for row in rows(directory / "rollouts.jsonl"):
        if row["split"] == "train":
            name = "again" if row["step"] >= step else "low_words"
            assert list(row["rewards"]) == [name]
            assert row["reward_sources"] == {name: digest[:12]}


def test_recorded_completions_get_the_rewards_they_had(
    finished: Finished, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished.code == 0, finished.err
    words = ("score", str(workspace / "out"), "--reward", f"{workspace / 'rewards.py'}:low_words")
    assert main(["reward", *words, "--against", "recorded:again"]) == 0
    said, total = re.findall(r"agreement: (\d+) of (\d+) the same", capsys.readouterr().out)[0]
    assert said == total


def test_a_run_ends_with_its_result_and_leaves_no_process(finished: Finished, workspace: Path) -> None:
    assert finished.code == 0, finished.err
    assert finished.left == []
    assert "is lost" not in finished.err
    result = finished.result()
    directory = workspace / "out"
    assert result["checkpoint"] == str(directory / "checkpoint")
    assert Path(result["curve"]).read_bytes().startswith(b"\x89PNG")
    assert list((directory / "tensorboard").glob("events.*"))
    assert (directory / "config.yaml").is_file()
    assert result["accuracy_after"] == pytest.approx(
        np.mean([row["reward"] for row in evaluated(directory, 3)])
    )


def test_after_every_sync_the_engine_computes_what_the_trainer_computes(
    finished: Finished, workspace: Path
) -> None:
    """A stale, misplaced or half-loaded tensor would show as a mismatch of log-probabilities."""
    assert finished.code == 0
    steps = [row for row in rows(workspace / "out" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row["sync/buckets"] > 3
        assert row["grad_norm"] > 0
        # With two optimizer steps per generation the old log-probabilities are the comparable ones too.
        assert row["sampling/logprob_difference_mean"] < 1e-5
    assert any(row["reward"] != steps[0]["reward"] for row in steps[1:])


def test_the_engines_greedy_texts_after_the_last_sync_are_transformers_of_the_checkpoint(
    finished: Finished, workspace: Path
) -> None:
    assert finished.code == 0
    assert_texts_are_transformers(workspace / "out", workspace / "out" / "checkpoint", step=3)


def test_the_trace_has_what_every_process_did(finished: Finished, workspace: Path) -> None:
    assert finished.code == 0
    trace = read_trace(workspace / "out" / "trace.json")
    ranks = [f"trainer rank {rank}" for rank in range(4)]
    workers = {"reward worker 0", "reward worker 1"}
    assert set(trace) - workers == {"driver", "bridge", "engine 0", *ranks}
    assert set(trace) & workers
    driver = {name: [span for span in trace["driver"] if span.name == name] for name in _PHASES}
    # Steps and what they consist of, one after the other; evaluations and saves are beside them.
    assert [len(driver[name]) for name in _PHASES] == [1, 1, 1, 3, 3, 2]
    for step, generate, sync in zip(_PHASES[:3], driver["generate"], driver["sync"], strict=True):
        (around,) = driver[step]
        assert around.overlaps(generate)
        assert around.overlaps(sync)
        assert generate.end <= sync.begin
    # Two optimizer steps for each of three steps; every version and the last one is saved.
    for rank in ranks:
        assert [sum(span.name == name for span in trace[rank]) for name in ("train", "save")] == [6, 2]
    forward = [span for span in trace["bridge"] if span.name == "forward"]
    buckets = [span for span in trace["bridge"] if span.name.startswith("sends bucket")]
    assert len(forward) == 4
    assert len(buckets) > 4 * 3
    assert all(any(sync.overlaps(bucket) for sync in forward) for bucket in buckets)
    for train in (span for span in trace[ranks[0]] if span.name == "train"):
        assert not any(train.overlaps(span) for span in trace["engine 0"] if span.name == "generate")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def test_tokens_are_recorded_as_engine_and_trainer_saw_them(finished: Finished, workspace: Path) -> None:
    assert finished.code == 0
    directory = workspace / "out"
    records = rows(directory / "tokens.jsonl")
    # Of record.token_steps 10, in three steps, the first.
    completions = {
        (row["prompt_id"], row["index"]): row
        for row in rows(directory / "rollouts.jsonl")
        if (row["split"], row["step"]) == ("train", 1)
    }
    assert records
    assert {row["step"] for row in records} == {1}
    changes = []
    for row in records:
        completion = completions[row["prompt_id"], row["index"]]
        assert len(row["tokens"]) == len(row["logprobs"]) == completion["tokens"]
        # Texts of completions leave special tokens out.
        words = [word for word in "".join(row["tokens"]).split() if not word.startswith("<")]
        assert words == completion["completion"].split()
        np.testing.assert_allclose(row["trainer_logprobs"], row["logprobs"], atol=2e-3)
        changes.append(np.abs(np.subtract(row["updated_logprobs"], row["trainer_logprobs"])).max())
    assert max(changes) > 1e-3


def test_events_say_what_was_saved(finished: Finished, workspace: Path) -> None:
    assert finished.code == 0
    events = rows(workspace / "out" / "events.jsonl")
    assert [(row["kind"], row["step"]) for row in events if row["kind"] not in ("best", "reward")] == [
        ("start", 0),
        ("checkpoint", 1),
        ("checkpoint", 2),
        ("end", 3),
        ("checkpoint", 3),
    ]
    assert events[-1]["path"] == "checkpoint"


def test_secrets_of_the_environment_are_in_nothing_that_the_run_wrote(
    finished: Finished, workspace: Path
) -> None:
    assert finished.code == 0
    assert len(list((workspace / "out").rglob("*"))) > 20
    assert with_secrets(workspace) == []
    # Ray listens on all addresses of the machine.
    assert json.loads((workspace / "out" / "run.lock").read_text())["wants_token"] is True


def test_weights_did_change(finished: Finished, workspace: Path) -> None:
    assert finished.code == 0
    before, after = tensors(workspace / "model"), tensors(workspace / "out" / "checkpoint")
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[key], before[key]) for key in before)


def test_checkpoints_on_the_way_are_of_their_steps_and_in_files_of_the_asked_size(
    finished: Finished, workspace: Path
) -> None:
    assert finished.code == 0
    folder = workspace / "out"
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
