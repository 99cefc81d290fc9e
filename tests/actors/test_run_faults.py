"""What goes wrong ends with one message, a non-zero exit, and no process left."""

import signal
import time
from pathlib import Path

import pytest

from tests.actors.run_helpers import make_workspace, rows, run, start

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("run"))


def test_a_reward_that_raises_ends_the_run_with_its_name(workspace: Path) -> None:
    finished = run(
        *("grpo", "--config", str(workspace / "grpo.yaml"), "--output_dir", str(workspace / "broken")),
        *("--rewards.0.function", f"{workspace / 'rewards.py'}:broken"),
    )
    assert finished.code == 1
    assert finished.left == []
    assert "broken" in finished.err
    assert "eval-" in finished.err
    assert "no such thing" in finished.err
    assert "Traceback" not in finished.err
    # Nothing of a step is left, so that the corrected command may use the directory.
    assert not list((workspace / "broken").glob("checkpoint*"))
    assert (workspace / "broken" / "metrics.jsonl").read_text() == ""


def test_too_few_cpus_say_what_was_asked_and_what_exists(workspace: Path) -> None:
    finished = run(
        *("sft", "--config", str(workspace / "sft.yaml"), "--output_dir", str(workspace / "few")),
        *("--cluster.num_cpus", "1", "--cluster.cpus_per_trainer_rank", "3"),
    )
    assert finished.code == 1
    assert finished.left == []
    assert "asks for 6 CPU" in finished.err
    assert "there are 1 CPU" in finished.err


def test_an_interrupt_ends_every_process(workspace: Path) -> None:
    running = start(
        *("grpo", "--config", str(workspace / "grpo.yaml"), "--output_dir", str(workspace / "interrupted")),
        *("--max_steps", "10000"),
    )
    metrics = workspace / "interrupted" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert running.process.poll() is None
        time.sleep(0.2)
    running.process.send_signal(signal.SIGINT)
    finished = running.finish(timeout=60)
    assert finished.code == 130
    assert finished.left == []
    assert "interrupted" in finished.err
    end = rows(metrics.with_name("events.jsonl"))[-1]
    assert (end["kind"], end["outcome"]) == ("end", "interrupted")
