"""Calls of rewards: arguments by name in every style, and what counts as an answer."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trl.rewards import accuracy_reward, think_format_reward

from algorithms.data import Group, Span, Verdict
from algorithms.rewards.calling import calls_of
from algorithms.rewards.child import call_async, call_now
from algorithms.rewards.loading import Reward, load_reward
from configs.rewards import RewardConfig
from tests.algorithms.rewards.groups import group, rollout

Load = Callable[..., Reward]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Writes the body of a file and loads its f."""
    monkeypatch.chdir(tmp_path)

    def load(text: str, **options: Any) -> Reward:
        (tmp_path / "f.py").write_text(text)
        return load_reward(RewardConfig(function="f.py:f", **options))

    return load


def verdicts(reward: Reward, scored: Group) -> list[Verdict]:
    calls = calls_of(reward, scored, range(len(scored.rollouts)))
    return [verdict for call in calls for verdict in call_now(reward, scored, call)]


def values(reward: Reward, scored: Group) -> list[float | None]:
    found = verdicts(reward, scored)
    assert not any(each.error for each in found), [each.error for each in found]
    return [each.value for each in found]


def errors(reward: Reward, scored: Group) -> list[str]:
    return [str(each.error) for each in verdicts(reward, scored)]


def seen(reward: Reward) -> list[Any]:
    """What the function noted in its file's list `seen`."""
    return reward.function.__globals__["seen"]  # type: ignore[attr-defined]


def test_arguments_of_a_sample_by_name(write: Load) -> None:
    reward = write(
        "seen = []\n"
        "def f(completion, *, prompt, messages, tokens, finish, answer, level=7, fixed, **rest):\n"
        "    seen.append((completion, prompt, messages, tokens.tolist(), finish, answer, level, fixed, rest))\n"
        "    return 0\n",
        kwargs={"fixed": ["me"]},
    )
    values(reward, group("a", "b", answer="5", source="s", finish="hidden"))
    messages = [{"role": "user", "content": "2+3?"}]
    same = ("stop", "5", 7, ["me"], {"source": "s"})
    assert seen(reward) == [
        ("a", "2+3?", messages, [0, 9], *same),
        ("b", "2+3?", messages, [1, 9], *same),
    ]
    values(reward, group("a", answer="5", level=1, prompt="as written"))
    assert (seen(reward)[-1][1], seen(reward)[-1][6]) == ("as written", 1)


def test_a_batch_is_called_once_with_lists(write: Load) -> None:
    reward = write(
        "seen = []\n"
        "def f(completions, prompts, answer, completion_ids, finish_reason, is_truncated, messages):\n"
        "    seen.append((completions, prompts, answer, completion_ids, finish_reason, is_truncated))\n"
        "    return [len(each) for each in completions]\n"
    )
    scored = group("a", "bcd", prompt="2+3=", answer="5")
    scored = replace(scored, rollouts=(scored.rollouts[0], rollout("bcd", 1, "length")))
    assert values(reward, scored) == [1.0, 3.0]
    same = (["2+3="] * 2, ["5"] * 2, [[0, 9], [1, 9]], ["stop", "length"], [False, True])
    assert seen(reward) == [(["a", "bcd"], *same)]


def test_a_group_is_called_once_with_the_group(write: Load) -> None:
    reward = write(
        "def f(group, answer):\n"
        "    texts = [rollout.text for rollout in group.rollouts]\n"
        "    return [texts.count(text) * (answer == group.prompt.columns['answer']) for text in texts]\n"
    )
    assert values(reward, group("a", "b", "a", answer="5")) == [2.0, 1.0, 2.0]


def test_trl_functions_work_unchanged() -> None:
    texts = [r"so \boxed{\frac{1}{3}}", r"so \boxed{\frac{1}{2}}", "<think>a a b a a b</think> end"]
    conversation = group(*texts, messages=[{"role": "user", "content": "?"}], solution=r"\frac{1}{3}")
    replies = [[{"role": "assistant", "content": text}] for text in texts]
    accuracy = load_reward(RewardConfig(function="trl.rewards:accuracy_reward"))
    found = verdicts(accuracy, conversation)
    expected = accuracy_reward(replies, [r"\frac{1}{3}"] * 3)
    assert [each.value for each in found] == expected == [1.0, 0.0, 0.0]
    # What it gives to log_extra is kept beside each value.
    assert found[0].notes["solution"] == r"\frac{1}{3}"
    form = load_reward(RewardConfig(function="trl.rewards:think_format_reward"))
    assert values(form, conversation) == think_format_reward(replies) == [0.0, 0.0, 1.0]


ORM = """
class ORM:
    def __init__(self, args=None, **kwargs):
        self.args = args

    def __call__(self, **kwargs):
        raise NotImplementedError


class f(ORM):
    def __call__(self, completions, solution, **kwargs):
        rewards = []
        for completion, truth, messages in zip(completions, solution, kwargs["messages"]):
            assert isinstance(completion, str) and messages[-1]["content"] == completion
            rewards.append(1.0 if completion == truth else 0.0)
        return rewards
"""


def test_ms_swifts_classes_work_unchanged(write: Load) -> None:
    conversation = group("5", "6", messages=[{"role": "user", "content": "?"}], solution="5")
    assert values(write(ORM), conversation) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("annotation", "choice", "expected"),
    [
        ("", "auto", "list"),
        (": list[str]", "auto", "str"),
        (": 'list[list[dict[str, str]]]'", "auto", "list"),
        ("", "text", "str"),
        (": list[str]", "messages", "list"),
    ],
)
def test_completions_of_a_conversation(write: Load, annotation: str, choice: str, expected: str) -> None:
    reward = write(
        f"def f(completions{annotation}, log_extra):\n"
        "    log_extra('kind', [type(each).__name__ for each in completions])\n"
        "    return [0] * len(completions)\n",
        completions_as=choice,
    )
    found = verdicts(reward, group("a", messages=[{"role": "user", "content": "?"}]))
    assert found[0].notes == {"kind": expected}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("True", 1.0),
        ("3", 3.0),
        ("__import__('numpy').float32(0.5)", 0.5),
        ("__import__('numpy').bool_(True)", 1.0),
        ("__import__('fractions').Fraction(1, 4)", 0.25),
        ("None", None),
        ("{'score': 2}", 2.0),
        ("{'score': None, 'why': 'no number'}", None),
    ],
)
def test_values_that_count(write: Load, value: str, expected: float | None) -> None:
    assert values(write(f"def f(): return {value}"), group("a")) == [expected]


@pytest.mark.parametrize(
    "value",
    ["float('nan')", "float('inf')", "10**400", "'1'", "[1.0]", "{}", "1j", "b''", "{'score': 'high'}"],
)
def test_values_that_do_not(write: Load, value: str) -> None:
    reward = write(f"def f(completion): return 0 if completion == 'a' else {value}")
    fine, bad = verdicts(reward, group("a", "b"))
    assert (fine.value, fine.error) == (0.0, None)
    assert str(bad.error).startswith("reward f: prompt train-3, completion 1: gave ")


def test_lists_of_a_batch_are_checked(write: Load) -> None:
    short = errors(write("def f(completions): return [1]"), group("a", "b"))
    assert short == ["reward f: prompt train-3: gave 1 values for 2 completions"] * 2
    assert "has to give a list" in errors(write("def f(completions): return 1"), group("a", "b"))[0]
    found = errors(write("def f(completions): return [1, float('nan')]"), group("a", "b"))
    assert found[0].startswith("reward f: prompt train-3, completion 1: gave nan")
    tensor = write("import torch\ndef f(completions): return torch.tensor([0.5, 2.0])")
    assert values(tensor, group("a", "b")) == [0.5, 2.0]
    array = write("import numpy\ndef f(completions): return numpy.array([0.5, 2.0])")
    assert values(array, group("a", "b")) == [0.5, 2.0]


def test_parts_notes_and_spans(write: Load) -> None:
    reward = write("def f(): return {'score': 1, 'style': 0.5, 'why': 'short', 'spans': [(0, 1, -2)]}")
    (found,) = verdicts(reward, group("a"))
    assert (found.value, found.parts, found.notes) == (1.0, {"style": 0.5}, {"why": "short"})
    assert found.spans == (Span(start=0, end=1, value=-2.0),)
    for spans in ("3", "[(1, 2)]", "[('a', 2, 1.0)]", "[(0, 1, float('nan'))]"):
        (error,) = errors(write(f"def f(): return {{'score': 1, 'spans': {spans}}}"), group("a"))
        assert "span" in error


def test_an_exception_names_sample_and_line(write: Load) -> None:
    reward = write("import json\n\ndef f(completion):\n    return json.loads(completion)\n")
    fine, bad = verdicts(reward, group("1", "{x"))
    assert fine.value == 1.0
    assert str(bad.error).startswith("reward f: prompt train-3, completion 1: JSONDecodeError: Expecting")
    assert str(bad.error).endswith("(f.py line 4: return json.loads(completion))")
    assert "SystemExit: 3" in errors(write("def f(): raise SystemExit(3)"), group("a"))[0]


def test_a_row_without_the_column(write: Load) -> None:
    (error,) = errors(write("def f(answer): return 1"), group("a"))
    assert "asks for 'answer', which this row of the dataset lacks" in error


def test_async_functions(write: Load) -> None:
    def call(reward: Reward, text: str) -> Verdict:
        scored = group(text)
        (found,) = asyncio.run(call_async(reward, scored, calls_of(reward, scored, (0,))[0]))
        return found

    text = "import asyncio\nasync def f(completion):\n    {}\n    return float(completion)\n"
    assert call(write(text.format("await asyncio.sleep(0)")), "2").value == 2.0
    late = call(write(text.format("await asyncio.sleep(60)"), timeout_s=0.05), "2")
    assert late.timed_out
    assert str(late.error).startswith("reward f: prompt train-3, completion 0: no answer within 0.05 s")
    stubborn = "try: await asyncio.sleep(60)\n    except BaseException: pass"
    assert call(write(text.format(stubborn), timeout_s=0.05), "2").timed_out
    own = call(write(text.format("raise TimeoutError('own')")), "2")
    assert not own.timed_out
    assert str(own.error).endswith("TimeoutError: own (f.py line 3: raise TimeoutError('own'))")


def test_numbers_are_finite_floats(write: Load) -> None:
    (value,) = values(write("import numpy\ndef f(): return numpy.float64(1e308)"), group("a"))
    assert value == np.float64(1e308)
    assert math.isfinite(value or math.inf)
