"""A run that is killed and started again goes on as if it had never been killed."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.actors.run_helpers import Finished, make_workspace, rows, run, start

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


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl", "tokens.jsonl"):
        expected_rows, found_rows = (list(map(without_times, rows(each / name))) for each in (one, other))
        assert found_rows == expected_rows, name
    expected, found = (load_file(each / "checkpoint" / "model.safetensors") for each in (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sft_goes_on_bitwise_after_it_was_killed(workspace: Path) -> None:
    words = (
        *("sft", "--config", str(workspace / "sft.yaml"), "--max_steps", "9", "--sft.batch_size", "6"),
        *("--lr_decay_style", "cosine", "--resume_steps", "2", "--eval_steps", "3", "--save_steps", "3"),
        *("--eval_dataset", str(workspace / "sft.jsonl")),
    )
    whole, cut = workspace / "whole", workspace / "cut"
    assert run(*words, "--output_dir", str(whole)).code == 0
    assert run_until(cut, 4, words).code == -signal.SIGKILL
    assert sorted(path.name for path in (cut / "resume").glob("step-?")) == ["step-2", "step-4"]
    resumed = run(*words, "--output_dir", str(cut))
    assert resumed.code == 0, resumed.err
    assert "goes on after step" in resumed.out
    assert_same_run(whole, cut)
    (event,) = [row for row in rows(cut / "events.jsonl") if row["kind"] == "resume"]
    assert event["step"] in (4, 6, 8)
    assert (cut / "best").readlink() == (whole / "best").readlink()
    again = run(*words, "--output_dir", str(cut))
    assert again.code == 2
    assert "holds a run already, which has finished" in again.err


def test_grpo_goes_on_bitwise_after_it_was_killed(workspace: Path) -> None:
    words = (
        *("grpo", "--config", str(workspace / "grpo.yaml"), "--max_steps", "5", "--resume_steps", "1"),
        *("--eval_steps", "2", "--beta", "0.1", "--sync_ref_model", "true", "--ref_model_sync_steps", "2"),
        *("--token_steps", "2"),
    )
    whole, cut = workspace / "grpo-whole", workspace / "grpo-cut"
    finished = run(*words, "--output_dir", str(whole))
    assert finished.code == 0, finished.err
    assert run_until(cut, 2, words).code == -signal.SIGKILL
    resumed = run(*words, "--output_dir", str(cut))
    assert resumed.code == 0, resumed.err
    assert_same_run(whole, cut)
