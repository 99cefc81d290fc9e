"""A run that is killed and started again goes on as if it had never been killed.

The run that is not killed is frozen for a moment, and what is in its directory then, as a SIGKILL would leave it,
is what the other run goes on from.
"""

import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from actors.cli import main
from actors.reward_swap import post_request, read_answer
from algorithms.rewards.loading import read_sources
from configs.rewards import RewardConfig
from tests.actors.run_helpers import (
    Running,
    assert_same_run,
    assert_same_weights,
    make_workspace,
    rows,
    run,
    start,
    steps_of,
    without_times,
)

pytestmark = pytest.mark.e2e

_OTHER = """
def high_words(completion: str, target: int) -> float:
    return sum(int(word[1:]) >= 150 for word in completion.split()) / 10
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("run"))


def fails_while_files_are_limited(running: Running, rank: int, directory: Path) -> None:
    """States cannot be written, as on a full disk; older ones stay, and later ones are saved again."""

    def saves() -> list[str]:
        return [row["text"] for row in rows(directory / "events.jsonl") if row["kind"] == "save"]

    before = resource.prlimit(rank, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    running.wait_for(lambda: bool(saves()))
    kept = sorted(int(path.name[5:]) for path in (directory / "resume").glob("step-*[0-9]"))
    assert len(kept) == 2
    resource.prlimit(rank, resource.RLIMIT_FSIZE, before)
    # Which of its files was too large first is a matter of time, and torch does not say why one is.
    assert f"could not be saved, older ones are as they were: {directory}" in saves()[0]
    last = max(steps_of(directory / "metrics.jsonl"))
    running.wait_for(lambda: bool([*(directory / "resume").glob(f"step-{last + 4 - last % 2}")]))


def test_sft_with_adapters_is_killed_and_goes_on_bitwise(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        *("sft", "--config", str(workspace / "sft.yaml"), "--max_steps", "1000", "--sft.batch_size", "6"),
        *("--lr_decay_style", "cosine", "--resume_steps", "2", "--eval_steps", "10", "--save_steps", "10"),
        *("--eval_dataset", str(workspace / "sft.jsonl"), "--tuner_type", "lora", "--lora_dropout", "0.1"),
        *("--trainer.tensor_model_parallel_size", "1"),
    )
    whole, cut = workspace / "whole", workspace / "cut"
    running = start(*words, "--output_dir", str(whole))
    running.wait_for((whole / "resume" / "step-4").exists)
    running.leave_behind(whole, cut)
    assert {path.name for path in (cut / "resume").glob("step-?")} == {"step-2", "step-4"}
    running.wait_for(lambda: max(steps_of(whole / "metrics.jsonl")) >= 11)
    (rank,) = running.pids("ray::TrainerRank")
    fails_while_files_are_limited(running, rank, whole)
    # It has more time than steps.
    running.process.send_signal(signal.SIGSTOP)
    assert main([*words, "--output_dir", str(whole)]) == 2
    assert f"is in use by process {running.process.pid} on" in capsys.readouterr().err
    status = run("status", str(whole))
    assert status.code == 0, status.err
    assert f"{whole}: running, process {running.process.pid} on" in status.out
    # Through its Ray, which wants a token.
    assert f"process: TrainerRank pid {rank}, " in status.out
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.communicate()
    # Ray's own agents may take half a minute.
    end = time.monotonic() + 30
    while running.pids("ray::TrainerRank"):
        assert time.monotonic() < end, "a rank outlives its driver"
        time.sleep(0.1)

    last = max(steps_of(whole / "metrics.jsonl"))
    running = start(*words, "--output_dir", str(cut))
    running.wait_for(lambda: max(steps_of(cut / "metrics.jsonl")) >= last)
    running.process.send_signal(signal.SIGTERM)
    ended = running.finish()
    assert (ended.code, ended.left) == (128 + signal.SIGTERM, [])
    assert "goes on after step 4" in ended.out
    assert "SIGTERM: ended after step" in ended.err
    result = json.loads((cut / "result.json").read_text())
    # The step that went on was finished, and is the one that is saved.
    assert result["finished"] is False
    assert result["state"] == str(cut / "resume" / f"step-{result['step']}")
    assert rows(cut / "metrics.jsonl")[-1]["step"] == result["step"] >= last
    expected = list(map(without_times, rows(whole / "metrics.jsonl")))
    found = list(map(without_times, rows(cut / "metrics.jsonl")))
    assert len(expected) > last
    assert found[: len(expected)] == expected
    assert_same_weights(*(each / "checkpoint-10" / "adapter_model.safetensors" for each in (whole, cut)))


def test_grpo_goes_on_bitwise_with_replaced_rewards_and_after_a_lost_rank(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the reference moves, and where the rank that is lost has the bridge in it."""
    words = (
        *("grpo", "--config", str(workspace / "grpo.yaml"), "--max_steps", "9", "--resume_steps", "1"),
        *("--eval_steps", "2", "--beta", "0.1", "--sync_ref_model", "true", "--ref_model_sync_steps", "2"),
        *("--token_steps", "2", "--bridge.placement", "trainer", "--reward_workers.num_workers", "1"),
    )
    whole, cut = workspace / "grpo-whole", workspace / "grpo-cut"
    (workspace / "other.py").write_text(_OTHER)
    running = start(*words, "--output_dir", str(whole))
    running.wait_for(lambda: 1 in steps_of(whole / "metrics.jsonl"))
    # What `bascule reward reload` asks for.
    other = RewardConfig(function=f"{workspace / 'other.py'}:high_words")
    post_request(whole, read_sources([other]), "1")
    running.wait_for(lambda: read_answer(whole, "1") is not None)
    used = read_answer(whole, "1")
    assert used is not None
    running.wait_for((whole / "resume" / f"step-{used}").exists)
    running.leave_behind(whole, cut)
    # The state has its text.
    (workspace / "other.py").unlink()
    finished = running.finish()
    assert finished.code == 0, finished.err
    scored = rows(whole / "rollouts.jsonl")
    assert {row["step"] for row in scored if "high_words" in row["rewards"]} >= {used, 9}

    running = start(*words, "--output_dir", str(cut))
    running.wait_for((cut / "resume" / f"step-{used + 1}").exists)
    os.kill(running.pids("ray::TrainerRank")[0], signal.SIGKILL)
    resumed = running.finish()
    assert (resumed.code, resumed.left) == (0, []), resumed.err
    assert f"it goes on after step {used}" in resumed.out
    assert "the trainer ranks are started again" in resumed.out
    assert_same_run(whole, cut)
    texts = [row["text"] for row in rows(cut / "events.jsonl")]
    assert sum("trainer ranks were started again" in text for text in texts) == 1
    assert main([*words, "--output_dir", str(cut)]) == 2
    assert "holds a run already, which has finished" in capsys.readouterr().err
