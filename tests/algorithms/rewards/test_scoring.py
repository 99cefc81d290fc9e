"""Scores of groups against values computed by hand, and errors that name function, sample and line."""

import asyncio
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from algorithms.data import Group, Prompt, Rollout, float_row, int_row
from algorithms.rewards.loading import Reward, load_reward, load_rewards
from algorithms.rewards.scoring import Call, RewardError, score_group
from configs.schema import RewardConfig


def group(*texts: str, **columns: Any) -> Group:
    messages = ({"role": "user", "content": "2+3?"},)
    rollouts = [
        Rollout(
            tokens=int_row([index, 9]),
            logprobs=float_row([0, 0]),
            text=text,
            finish="stop",
            loss_mask=int_row([1, 1]),
            versions=(0, 0),
        )
        for index, text in enumerate(texts)
    ]
    prompt = Prompt(id="train-3", tokens=int_row([1]), messages=messages, columns=columns)
    return Group(prompt=prompt, rollouts=tuple(rollouts))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Reward]:
    """Writes the body of a file and loads its function f."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, **options: Any) -> Reward:
        (tmp_path / "f.py").write_text(text)
        return load_reward(RewardConfig(function="f.py:f", **options))

    return load


def test_weighted_sum_over_the_functions_that_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(
        "def right(completion, answer): return completion == answer\n"
        "def length(completion): return None if 'x' in completion else len(completion)\n"
        "def never(): return None\n"
    )
    names = {"right": 2.0, "length": -0.5, "never": 1.0}
    rewards = load_rewards([RewardConfig(function=f"f.py:{n}", weight=w) for n, w in names.items()])
    scored = score_group(rewards, group("5", "x", "abc", answer="5"))
    assert scored.parts == {
        "right": (1.0, 0.0, 0.0),
        "length": (1.0, None, 3.0),
        "never": (None, None, None),
    }
    np.testing.assert_array_equal(scored.rewards, np.array([2 * 1 - 0.5 * 1, 2 * 0, -0.5 * 3], np.float32))
    assert scored.rewards.dtype == np.float32
    (alone,) = score_group(rewards[2:], group("5")).rewards
    assert math.isnan(alone)


def test_arguments_by_name(write: Callable[..., Reward]) -> None:
    reward = write(
        "seen = []\n"
        "def f(completion, *, prompt, messages, tokens, finish, answer, level=7, fixed, **rest):\n"
        "    seen.append((completion, prompt, messages, tokens.tolist(), finish, answer, level, fixed, rest))\n"
        "    return 0\n",
        kwargs={"fixed": "me"},
    )
    score_group([reward], group("a", "b", answer="5", source="s", finish="hidden"))
    messages = [{"role": "user", "content": "2+3?"}]
    same = ("stop", "5", 7, "me", {"source": "s"})
    seen = reward.function.__globals__["seen"]  # type: ignore[attr-defined]
    assert seen == [("a", "2+3?", messages, [0, 9], *same), ("b", "2+3?", messages, [1, 9], *same)]
    score_group([reward], group("a", answer="5", level=1, prompt="as written"))
    assert (seen[-1][1], seen[-1][6]) == ("as written", 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("True", 1.0),
        ("3", 3.0),
        ("__import__('numpy').float32(0.5)", 0.5),
        ("__import__('numpy').bool_(True)", 1.0),
        ("__import__('fractions').Fraction(1, 4)", 0.25),
        ("None", None),
    ],
)
def test_values_that_count(write: Callable[..., Reward], value: str, expected: float | None) -> None:
    scored = score_group([write(f"def f(): return {value}")], group("a"))
    assert scored.parts["f"] == (expected,)


@pytest.mark.parametrize(
    "value", ["float('nan')", "float('inf')", "10**400", "'1'", "[1.0]", "{}", "1j", "b''"]
)
def test_values_that_do_not(write: Callable[..., Reward], value: str) -> None:
    reward = write(f"def f(completion): return 0 if completion == 'a' else {value}")
    with pytest.raises(
        RewardError, match=r"^reward f: prompt train-3, completion 1: gave .*a finite number"
    ) as e:
        score_group([reward], group("a", "b"))
    assert repr(eval(value))[:70] in str(e.value)


def test_an_exception_names_sample_and_line(write: Callable[..., Reward]) -> None:
    reward = write("import json\n\ndef f(completion):\n    return json.loads(completion)\n")
    with pytest.raises(RewardError) as caught:
        score_group([reward], group("1", "{x"))
    assert str(caught.value).startswith("reward f: prompt train-3, completion 1: JSONDecodeError: Expecting")
    assert str(caught.value).endswith("(f.py line 4: return json.loads(completion))")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_row_without_the_column(write: Callable[..., Reward]) -> None:
    with pytest.raises(RewardError, match="asks for 'answer', which this row of the dataset lacks"):
        score_group([write("def f(answer): return 1")], group("a"))


def test_async_functions_wait_beside_each_other_and_keep_their_loop(write: Callable[..., Reward]) -> None:
    reward = write(
        "import asyncio\nloops = set()\nwaiting = []\n"
        "async def f(completion):\n"
        "    loops.add(id(asyncio.get_running_loop()))\n"
        "    waiting.append(completion)\n"
        # Ends only when all three have started.
        "    while len(waiting) < 3: await asyncio.sleep(0)\n"
        "    return float(completion)\n",
        timeout_s=30,
    )
    with asyncio.Runner() as runner:
        for _ in range(2):
            assert score_group([reward], group("1", "2", "3"), runner=runner).parts["f"] == (1.0, 2.0, 3.0)
    assert len(reward.function.__globals__["loops"]) == 1  # type: ignore[attr-defined]


def test_async_functions_that_are_late_or_raise(write: Callable[..., Reward]) -> None:
    text = "import asyncio\nasync def f(completion):\n    {}\n    return 1.0\n"
    late = write(text.format("await asyncio.sleep(60 if completion == 'b' else 0)"), timeout_s=0.05)
    with pytest.raises(
        RewardError, match=r"^reward f: prompt train-3, completion 1: no answer within 0\.05 s"
    ):
        score_group([late], group("a", "b"))
    failing = write(text.format("raise TimeoutError('own')"))
    with pytest.raises(RewardError, match=r"completion 0: TimeoutError: own \(f\.py line 3: raise Tim"):
        score_group([failing], group("a", "b"))


def test_calls_are_announced(write: Callable[..., Reward]) -> None:
    heard: list[Call] = []
    score_group([write("def f(): return 1", timeout_s=3)], group("a", "b"), on_call=heard.append)
    assert heard == [Call(reward="f", prompt="train-3", index=index, timeout_s=3) for index in (0, 1)]
