"""Reward functions in real Ray workers: values by hand, and functions that raise, hang, exit or do not load."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from actors.deadline import ActorLostError, DeadlineExceededError
from actors.reward_worker import RewardGroup, create_reward_group
from algorithms.data import Group
from algorithms.rewards.calling import RewardError
from algorithms.rewards.loading import read_sources
from configs.data import DataConfig
from configs.errors import ConfigError
from configs.rewards import RewardConfig, RewardWorkersConfig
from configs.schema import ModelConfig, RunConfig
from tests.algorithms.rewards import groups

pytestmark = pytest.mark.e2e

FUNCTIONS = """
import os, time
from pathlib import Path

def right(completion, answer):
    return completion == answer

def fails(completion):
    return 1 / (completion != "b")

def pid():
    return os.getpid()

def started(completion, mark):
    Path(mark, completion).touch()
    return 1

def slow(completion, mark):
    Path(mark, "started").touch()
    time.sleep(1)
    return 1

def ends(completion):
    os.kill(os.getppid(), 9)
    time.sleep(60)

def together(completions):
    return [len(completions)] * len(completions)
"""


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    # Ray's sockets are below it, and their paths are limited to 107 characters: pytest's folders are too deep.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:
        patch.setenv("RAY_raylet_start_wait_time_s", "180")
        ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=folder)
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


def config(*names: str, num_workers: int = 1, **options: Any) -> RunConfig:
    rewards = tuple(RewardConfig(function=f"f.py:{name}", **options) for name in names)
    return RunConfig(
        model=ModelConfig(model="none"),
        data=DataConfig(dataset="none"),
        rewards=rewards,
        reward_workers=RewardWorkersConfig(num_workers=num_workers, loud_calls=0),
    )


def group(name: str, *texts: str, **columns: Any) -> Group:
    return groups.group(*texts, name=name, **columns)


@pytest.mark.usefixtures("local_ray")
def test_groups_are_scored_while_more_are_generated(tmp_path: Path) -> None:
    def generate() -> Iterator[Group]:
        yield group("train-1", "5", "6", answer="5", mark=str(tmp_path))
        limit = time.monotonic() + 60
        while not (tmp_path / "6").exists():
            assert time.monotonic() < limit, "scoring waits for the iterator"
            time.sleep(0.01)
        yield group("train-2", "7", answer="7", mark=str(tmp_path))

    judge = create_reward_group(config("right", "started", weight=2.0, num_workers=2))
    scored = {each.group.prompt.id: each for each in judge.score(generate())}
    judge.close()
    assert scored["train-1"].rewards.tolist() == [4.0, 2.0]
    assert scored["train-1"].parts == {"right": (1.0, 0.0), "started": (1.0, 1.0)}
    assert scored["train-2"].rewards.tolist() == [4.0]
    assert scored["train-1"].group.rollouts[1].text == "6"


@pytest.mark.usefixtures("local_ray")
def test_a_completion_is_scored_before_its_group_is_there(tmp_path: Path) -> None:
    judge = create_reward_group(config("started", "together", "pid"))
    whole = group("p", "a", "b", mark=str(tmp_path))
    worker = judge.worker_for(whole.prompt)
    ray.get(worker.hear.remote(whole.prompt, whole.rollouts[0], 0), timeout=60)
    limit = time.monotonic() + 60
    while not (tmp_path / "a").exists():
        assert time.monotonic() < limit, "nothing happens before the group is there"
        time.sleep(0.01)
    # A second call would leave the mark again.
    (tmp_path / "a").unlink()
    (scored,) = judge.score([whole])
    judge.close()
    assert scored.parts["started"] == (1.0, 1.0)
    assert scored.parts["together"] == (2.0, 2.0)
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_failure_of_a_completion_heard_of_has_its_number() -> None:
    judge = create_reward_group(config("fails"))
    whole = group("p", "a", "b", "b")
    worker = judge.worker_for(whole.prompt)
    ray.get(worker.hear.remote(whole.prompt, whole.rollouts[2], 2), timeout=60)
    said = ray.get(worker.score.remote(whole), timeout=60)["fails"]
    judge.close()
    assert [each.value for each in said] == [1.0, None, None]
    assert "completion 1: ZeroDivisionError" in said[1].error
    assert "completion 2: ZeroDivisionError" in said[2].error


@pytest.mark.usefixtures("local_ray")
def test_failures_reach_the_driver_by_name_and_the_workers_live_on() -> None:
    judge = create_reward_group(config("fails", "pid"))
    with pytest.raises(
        RewardError, match=r"^reward fails: prompt p, completion 1: ZeroDivisionError.*f\.py line 9: return"
    ):
        list(judge.score([group("p", "a", "b")]))
    (first,) = judge.score([group("p", "a")])
    judge.close()
    assert first.parts["fails"] == (1.0,)
    assert not Path(f"/proc/{int(first.parts['pid'][0] or 0)}").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_lost_worker_is_replaced_and_its_groups_are_scored_again(tmp_path: Path) -> None:
    told: list[str] = []
    judge = create_reward_group(config("slow", "right"))
    judge.tell(lambda step, kind, text, **details: told.append(f"{kind} {text}"))
    groups_of_one = [group(f"p{n}", "5", answer="5", mark=str(tmp_path)) for n in range(3)]
    killed: list[int] = []

    def generate() -> Iterator[Group]:
        yield from groups_of_one[:2]
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        killed.append(ray.get(judge.workers[0].__ray_call__.remote(lambda _: os.getpid()), timeout=60))
        os.kill(killed[0], signal.SIGKILL)
        yield groups_of_one[2]

    found = {each.group.prompt.id: each.parts["right"] for each in judge.score(generate())}
    judge.close()
    assert found == {"p0": (1.0,), "p1": (1.0,), "p2": (1.0,)}
    assert len(told) == 1
    assert told[0].startswith("restart reward worker 0 was started again in ")


@pytest.mark.usefixtures("local_ray")
def test_workers_are_not_replaced_for_ever() -> None:
    settings = config("ends")
    settings = settings.model_copy(
        update={"reward_workers": RewardWorkersConfig(num_workers=1, max_recoveries=1)}
    )
    judge = create_reward_group(settings)
    with pytest.raises(ActorLostError, match="score: reward worker 0 is gone"):
        list(judge.score([group("p", "a")]))
    judge.close()


@pytest.mark.usefixtures("local_ray")
def test_rewards_are_swapped_or_stay_as_they_are(tmp_path: Path) -> None:
    judge = create_reward_group(config("right", num_workers=2))
    scored = group("p", "5", "6", answer="5")
    assert next(judge.score([scored])).parts == {"right": (1.0, 0.0)}
    (tmp_path / "f.py").write_text("def right(completion: oops): return 1")
    with pytest.raises(ConfigError, match="NameError: name 'oops' is not defined"):
        judge.reload(read_sources([RewardConfig(function="f.py:right")]), 60)
    assert next(judge.score([scored])).parts == {"right": (1.0, 0.0)}
    (tmp_path / "f.py").write_text("def right(completion): return 7")
    (loaded,) = judge.reload(read_sources([RewardConfig(function="f.py:right", weight=0.5, name="new")]), 60)
    swapped = next(judge.score([scored]))
    judge.close()
    assert loaded.sha256 == hashlib.sha256(b"def right(completion): return 7").hexdigest()
    assert (swapped.parts, swapped.rewards.tolist()) == ({"new": (7.0, 7.0)}, [3.5, 3.5])


@pytest.mark.usefixtures("local_ray")
def test_a_function_that_does_not_load_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="no function wrong"):
        create_reward_group(config("wrong"))


@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_never_answers_does_not_hold_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def score(self, group: Group) -> None:
            time.sleep(60)

        def finished(self) -> int:
            return 0

    monkeypatch.setattr("actors.reward_worker.MARGIN_S", 0.5)
    worker: Any = ray.remote(Silent).options(num_cpus=0).remote()
    sources = read_sources([RewardConfig(function="exact_match", timeout_s=0.1)])
    with pytest.raises(
        DeadlineExceededError, match=r"worker 0 gave no answer for prompt p .*\(exact_match\)"
    ):
        list(RewardGroup([worker], sources, (), RewardWorkersConfig()).score([group("p", "a")]))
    with pytest.raises(RayActorError):
        ray.get(worker.score.remote(group("p", "a")), timeout=30)


def test_a_worker_starts_without_torch() -> None:
    """It would take two seconds of every worker, and 200 MB."""
    check = "import sys, actors.reward_worker, actors.environment_worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
