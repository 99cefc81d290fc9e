"""What goes wrong ends with one message, a non-zero exit, and no process left."""

from pathlib import Path

import pytest

from tests.actors.run_helpers import make_workspace, run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("run"))


def test_a_reward_that_raises_ends_the_run_with_its_name(workspace: Path) -> None:
    finished = run(
        *("grpo", "--config", str(workspace / "grpo.yaml"), "--output_dir", str(workspace / "broken")),
        *("--rewards.0.function", f"{workspace / 'rewards.py'}:broken", "--tensor_model_parallel_size", "1"),
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
