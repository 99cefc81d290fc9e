"""A run that is killed and started again goes on as if it had never been killed."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.status import describe_run
from tests.actors.run_helpers import Finished, Running, make_workspace, rows, run, start

pytestmark = pytest.mark.e2e

# What depends on how long something took.
_TIMES = ("time/", "tokens_per_second", "sync/")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("run"))


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in row.items() if not name.startswith(_TIMES) and "seconds" not in name
    }


def run_until(directory: Path, step: int, words: tuple[str, ...]) -> Finished:
    """Start a run and kill it with SIGKILL, all of its processes, as soon as it has the state of this step."""
    running = start(*words, "--output_dir", str(directory))
    end = time.monotonic() + 300
    while time.monotonic() < end and not (directory / "resume" / f"step-{step}").exists():
        assert running.process.poll() is None, running.finish()
        time.sleep(0.01)
    os.kill(running.process.pid, signal.SIGKILL)
    return running.finish()


def assert_same_run(one: Path, other: Path, weights: str = "model.safetensors") -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl", "tokens.jsonl"):
        expected_rows, found_rows = (list(map(without_times, rows(each / name))) for each in (one, other))
        assert found_rows == expected_rows, name
    expected, found = (load_file(each / "checkpoint" / weights) for each in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def start_until(directory: Path, step: int, words: tuple[str, ...]) -> Running:
    """Start a run and wait until it has recorded this step."""
    running = start(*words, "--output_dir", str(directory))
    end = time.monotonic() + 300
    while time.monotonic() < end and step not in steps_of(directory / "metrics.jsonl"):
        assert running.process.poll() is None, running.finish()
        time.sleep(0.01)
    return running


def steps_of(metrics: Path) -> list[int]:
    """Steps that were trained, of the lines that are complete."""
    text = metrics.read_text() if metrics.is_file() else ""
    found = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [row["step"] for row in found if "loss" in row]


def test_sft_with_adapters_is_the_same_run_whatever_happens_to_it(workspace: Path) -> None:
    """SIGKILL, SIGTERM, a time limit and a lost rank, one after the other, change no number of it."""
    words = (
        *("sft", "--config", str(workspace / "sft.yaml"), "--max_steps", "50", "--sft.batch_size", "6"),
        *("--lr_decay_style", "cosine", "--resume_steps", "2", "--eval_steps", "20", "--save_steps", "20"),
        *("--eval_dataset", str(workspace / "sft.jsonl"), "--tuner_type", "lora", "--lora_dropout", "0.1"),
    )
    whole, cut = workspace / "whole", workspace / "cut"
    assert run(*words, "--output_dir", str(whole)).code == 0
    assert run_until(cut, 4, words).code == -signal.SIGKILL
    assert sorted(path.name for path in (cut / "resume").glob("step-?")) == ["step-2", "step-4"]

    running = start_until(cut, 8, words)
    # It has more time than steps.
    running.process.send_signal(signal.SIGSTOP)
    other = run(*words, "--output_dir", str(cut))
    assert other.code == 2
    assert f"is in use by process {running.process.pid} on" in other.err
    status = run("status", str(cut), "--files")
    assert status.code == 0, status.err
    assert f"{cut}: running, process {running.process.pid} on" in status.out
    running.process.send_signal(signal.SIGTERM)
    running.process.send_signal(signal.SIGCONT)
    ended = running.finish()
    assert (ended.code, ended.left) == (128 + signal.SIGTERM, [])
    assert "SIGTERM: ended after step" in ended.err
    result = json.loads((cut / "result.json").read_text())
    # The step that went on was finished, and is the one that is saved.
    assert result["finished"] is False
    assert result["state"] == str(cut / "resume" / f"step-{result['step']}")
    assert rows(cut / "metrics.jsonl")[-1]["step"] == result["step"] >= 8
    assert next(describe_run(cut, live=True, stacks=False)) == f"{cut}: interrupted, {ended.err.strip()}"

    limited = run(*words, "--output_dir", str(cut), "--time_limit", "1s")
    assert (limited.code, limited.left) == (0, [])
    assert "time_limit: ended after step" in limited.out

    step = json.loads((cut / "result.json").read_text())["step"]
    running = start_until(cut, step + 3, words)
    os.kill(running.pids("ray::TrainerRank")[0], signal.SIGKILL)
    finished = running.finish()
    assert finished.code == 0, finished.err
    assert finished.left == []
    assert "the trainer ranks are started again" in finished.out

    assert_same_run(whole, cut, weights="adapter_model.safetensors")
    kinds = [row["kind"] for row in rows(cut / "events.jsonl")]
    assert kinds.count("restart") == 1
    assert (cut / "best").readlink() == (whole / "best").readlink()
    again = run(*words, "--output_dir", str(cut))
    assert again.code == 2
    assert "holds a run already, which has finished" in again.err


def test_grpo_goes_on_bitwise_after_an_interrupt_and_a_lost_rank(workspace: Path) -> None:
    words = (
        *("grpo", "--config", str(workspace / "grpo.yaml"), "--max_steps", "6", "--resume_steps", "1"),
        *("--eval_steps", "2", "--beta", "0.1", "--sync_ref_model", "true", "--ref_model_sync_steps", "2"),
        *("--token_steps", "2"),
    )
    whole, cut = workspace / "grpo-whole", workspace / "grpo-cut"
    finished = run(*words, "--output_dir", str(whole))
    assert finished.code == 0, finished.err
    running = start_until(cut, 2, words)
    running.process.send_signal(signal.SIGINT)
    interrupted = running.finish(timeout=120)
    assert (interrupted.code, interrupted.left) == (130, [])
    end = rows(cut / "events.jsonl")[-1]
    assert (end["kind"], end["outcome"]) == ("end", "interrupted")
    running = start(*words, "--output_dir", str(cut))
    while not (cut / "resume" / "step-4").exists():
        assert running.process.poll() is None, running.finish()
        time.sleep(0.01)
    os.kill(running.pids("ray::TrainerRank")[1], signal.SIGKILL)
    resumed = running.finish()
    assert resumed.code == 0, resumed.err
    assert "the run goes on after step" in resumed.out
    assert_same_run(whole, cut)
