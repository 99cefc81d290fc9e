"""Reward functions in real Ray workers: values by hand, and functions that raise, hang, exit or do not load."""

import os
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

from actors.deadline import DeadlineExceededError
from actors.reward_worker import RewardGroup, RewardProcess, create_reward_group
from algorithms.data import Group, Prompt, Rollout, float_row, int_row
from algorithms.rewards.loading import read_sources
from algorithms.rewards.scoring import RewardError
from configs.data import DataConfig
from configs.errors import ConfigError
from configs.schema import ModelConfig, RewardConfig, RunConfig

pytestmark = pytest.mark.e2e

FUNCTIONS = """
import os, re, sys, time
from pathlib import Path

def right(completion, answer):
    return completion == answer

def fails(completion):
    return 1 / (completion != "b")

def sleeps(completion):
    time.sleep(60 if completion == "b" else 0)
    return 0

def backtracks(completion):
    return re.fullmatch("(a+)+b", completion) is None

def exits(completion):
    os._exit(3)

def pid():
    return os.getpid()

def started(completion, mark):
    Path(mark, completion).touch()
    return 1
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


def config(*names: str, **options: Any) -> RunConfig:
    rewards = tuple(RewardConfig(function=f"f.py:{name}", **options) for name in names)
    return RunConfig(model=ModelConfig(model="none"), data=DataConfig(dataset="none"), rewards=rewards)


def group(name: str, *texts: str, **columns: Any) -> Group:
    rollouts = [
        Rollout(
            tokens=int_row([1]),
            logprobs=float_row([0]),
            text=text,
            finish="stop",
            loss_mask=int_row([1]),
            versions=(0, 0),
        )
        for text in texts
    ]
    messages = ({"role": "user", "content": "?"},)
    prompt = Prompt(id=name, tokens=int_row([1]), messages=messages, columns=columns)
    return Group(prompt=prompt, rollouts=tuple(rollouts))


def process(name: str, timeout_s: float = 10.0) -> RewardProcess:
    sources = read_sources([RewardConfig(function=f"f.py:{name}", timeout_s=timeout_s)])
    return RewardProcess(sources, start_timeout_s=60)


@pytest.mark.usefixtures("local_ray")
def test_groups_are_scored_while_more_are_generated(tmp_path: Path) -> None:
    def generate() -> Iterator[Group]:
        yield group("train-1", "5", "6", answer="5", mark=str(tmp_path))
        limit = time.monotonic() + 60
        while not (tmp_path / "6").exists():
            assert time.monotonic() < limit, "scoring waits for the iterator"
            time.sleep(0.01)
        yield group("train-2", "7", answer="7", mark=str(tmp_path))

    judge = create_reward_group(config("right", "started", weight=2.0), num_workers=2)
    scored = {each.group.prompt.id: each for each in judge.score(generate())}
    judge.close()
    assert scored["train-1"].rewards.tolist() == [4.0, 2.0]
    assert scored["train-1"].parts == {"right": (1.0, 0.0), "started": (1.0, 1.0)}
    assert scored["train-2"].rewards.tolist() == [4.0]
    assert scored["train-1"].group.rollouts[1].text == "6"


@pytest.mark.usefixtures("local_ray")
def test_failures_reach_the_driver_by_name_and_the_workers_live_on() -> None:
    judge = create_reward_group(config("fails", "sleeps", "pid", timeout_s=1.0))
    with pytest.raises(
        RewardError, match=r"^reward fails: prompt p, completion 1: ZeroDivisionError.*f\.py line 9: return"
    ):
        list(judge.score([group("p", "a", "b")]))
    judge.close()
    judge = create_reward_group(config("sleeps", "pid", timeout_s=1.0))
    (first,) = judge.score([group("p", "a")])
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"^reward sleeps: prompt p, completion 2: no answer within 1 s"):
        list(judge.score([group("p", "a", "a", "b")]))
    assert time.monotonic() - start < 20
    child = int(first.parts["pid"][0] or 0)
    assert not Path(f"/proc/{child}").exists()
    (second,) = judge.score([group("p", "a")])
    judge.close()
    assert second.parts["pid"] != first.parts["pid"]
    assert not Path(f"/proc/{int(second.parts['pid'][0] or 0)}").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_function_that_does_not_load_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="no function wrong"):
        create_reward_group(config("wrong"))


@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_never_answers_does_not_hold_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def score(self, group: Group) -> None:
            time.sleep(60)

    monkeypatch.setattr("actors.reward_worker.MARGIN_S", 0.5)
    worker: Any = ray.remote(Silent).options(num_cpus=0).remote()
    sources = read_sources([RewardConfig(function="exact_match", timeout_s=0.1)])
    with pytest.raises(
        DeadlineExceededError, match=r"worker 0 gave no answer for prompt p .*\(exact_match\)"
    ):
        list(RewardGroup([worker], sources).score([group("p", "a")]))
    with pytest.raises(RayActorError):
        ray.get(worker.score.remote(group("p", "a")), timeout=30)


def test_a_call_that_holds_the_interpreter_is_ended() -> None:
    worker = process("backtracks", timeout_s=1.0)
    assert worker.score(group("p", "ac")).rewards.tolist() == [1.0]
    with pytest.raises(
        RewardError, match=r"^reward backtracks: prompt p, completion 0: no answer within 1 s"
    ):
        worker.score(group("p", "a" * 64))
    worker.close()


def test_a_function_that_ends_its_process_is_named() -> None:
    worker = process("exits")
    with pytest.raises(
        RewardError, match=r"^reward exits: prompt p, completion 0: the process ended with exit code 3"
    ):
        worker.score(group("p", "a"))
    worker.close()


HOLDER = """
import sys
from actors.reward_worker import RewardProcess
from algorithms.rewards.loading import read_sources
from configs.schema import RewardConfig
process = RewardProcess(read_sources([RewardConfig(function="f.py:backtracks")]), start_timeout_s=60)
process.start()
sys.stdout.write(str(process._process.pid) + chr(10))
sys.stdout.flush()
from tests.actors.test_reward_worker import group
process.score(group("p", "a" * 60))
"""


def test_a_child_in_a_call_dies_with_its_killed_worker() -> None:
    """The call holds the interpreter, so nothing in the child can notice: the kernel has to end it."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        child = Path("/proc", holder.stdout.readline().strip())
        time.sleep(2)
        assert child.exists()
        holder.kill()
    deadline = time.monotonic() + 10
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists()
