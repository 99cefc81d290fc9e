"""Environments in real child processes: functions and objects, and those that raise, hang or end."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from algorithms.data import Prompt, int_row
from algorithms.environments.calling import Reply, Step
from algorithms.environments.loading import load_environment, read_environment
from algorithms.environments.process import EnvironmentRunner
from configs.environment import EnvironmentConfig
from configs.errors import ConfigError

CODE = """
import asyncio, os, time

def echo(completion, turns, goal, extra=0):
    if completion == "end":
        return None
    return {"observation": f"{completion} {len(turns)} {goal} {extra}", "reward": 0.5, "role": "user"}

async def later(completion):
    await asyncio.sleep(60 if completion == "hang" else 0.01)
    return completion + "!"

class Counter:
    def __init__(self, goal, start):
        self.count, self.goal = start, goal

    def step(self, completion):
        if completion == "boom":
            raise RuntimeError("no")
        if completion == "hang":
            time.sleep(60)
        if completion == "exit":
            os._exit(3)
        self.count += 1
        return f"{self.count} of {self.goal}"

def odd(completion):
    return 7

class Empty:
    pass
"""
PROMPT = Prompt(
    id="p1", tokens=int_row([1]), messages=({"role": "user", "content": "q"},), columns={"goal": "9"}
)


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "e.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


@contextmanager
def runner(name: str, **options: Any) -> Iterator[EnvironmentRunner]:
    source = read_environment(EnvironmentConfig(function=f"e.py:{name}", **options))
    with closing(EnvironmentRunner(source, start_timeout_s=60)) as made:
        made.start()
        yield made


def reply(made: EnvironmentRunner, *said: str, episode: str = "a") -> Reply:
    """To the last of these turns, with observations `o` between them."""
    turns: list[dict[str, str]] = []
    for each in said:
        turns += [{"role": "assistant", "content": each}, {"role": "user", "content": "o"}]
    step = Step(number=0, episode=episode, prompt=PROMPT, turns=tuple(turns[:-1]))
    return made.submit(step).result(60)


def test_a_function_has_its_arguments_by_name() -> None:
    with runner("echo", kwargs={"extra": 5}) as made:
        assert reply(made, "x", "y") == Reply(observation="y 3 9 5", reward=0.5, role="user")
        assert reply(made, "end") == Reply(done=True)


def test_an_object_lives_for_an_episode_and_is_made_again_when_its_process_was_lost() -> None:
    with runner("Counter", kwargs={"start": 10}, timeout_s=2) as made:
        assert reply(made, "x").observation == "11 of 9"
        assert reply(made, "x", "y").observation == "12 of 9"
        assert reply(made, "x", episode="b").observation == "11 of 9"
        late = reply(made, "x", "hang", episode="b")
        expected = "environment Counter: prompt p1, turn 2: no answer within 2 s; make it faster or raise"
        assert str(late.error).startswith(expected)
        # The other episode's object went with the process.
        assert reply(made, "x", "y", "z").observation == "13 of 9"
        ended = reply(made, "exit", episode="c")
        assert "environment Counter: prompt p1, turn 1: the process ended with exit code 3" in str(
            ended.error
        )
        failed = reply(made, "boom", episode="d")
        assert str(failed.error).startswith(
            "environment Counter: prompt p1, turn 1: RuntimeError: no (e.py line"
        )


def test_async_calls_run_beside_each_other_and_are_given_up_in_time() -> None:
    with runner("later", timeout_s=1) as made:
        assert [reply(made, text).observation for text in "ab"] == ["a!", "b!"]
        assert "turn 1: no answer within 1 s" in str(reply(made, "hang").error)


def test_what_is_no_reply_and_what_cannot_be_called_is_named() -> None:
    with runner("odd") as made:
        assert str(reply(made, "x").error) == (
            "environment odd: prompt p1, turn 1: gave 7; it gives None to end, a text, or a dict of observation, "
            "role, reward, done"
        )
    with pytest.raises(ConfigError, match=r"environment e\.py:Empty: the class Empty has no method `step`"):
        load_environment(EnvironmentConfig(function="e.py:Empty"))
    with pytest.raises(ConfigError, match="environment nothing is not built in"):
        load_environment(EnvironmentConfig(function="nothing"))
    with pytest.raises(ConfigError, match=r"environment e\.py:echo asks for the argument 'goal'"):
        load_environment(EnvironmentConfig(function="e.py:echo")).check_columns(["other"])
