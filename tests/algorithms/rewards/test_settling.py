"""Rewards of groups against sums by hand, and what failed calls do to them."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from algorithms.data import Scored, Span, Verdict
from algorithms.rewards.calling import RewardError
from algorithms.rewards.settling import Settler
from configs.rewards import RewardConfig, RewardWorkersConfig
from tests.algorithms.rewards.groups import group

BAD = Verdict(error="reward f: it broke", seconds=1.0)


def good(*values: float | None) -> list[Verdict]:
    return [Verdict(value=value) for value in values]


def settle(on_error: Any, *said: Verdict, loud_calls: int = 0) -> Scored:
    settler = Settler(
        {"f": RewardConfig(function="f", on_error=on_error), "g": RewardConfig(function="g", weight=0.5)},
        RewardWorkersConfig(loud_calls=loud_calls),
    )
    return settler.settle(group("a", "b"), {"f": said, "g": good(2.0, 4.0)})


def test_weighted_sum_over_the_rewards_that_apply() -> None:
    weights = {"right": 2.0, "length": -0.5, "never": 1.0}
    settler = Settler(
        {name: RewardConfig(function=name, weight=weight) for name, weight in weights.items()},
        RewardWorkersConfig(),
    )
    said = {"right": good(1, 0, 0), "length": good(1, None, 3), "never": good(None, None, None)}
    scored = settler.settle(group("5", "x", "abc"), said)
    assert scored.parts["length"] == (1, None, 3)
    np.testing.assert_array_equal(scored.rewards, np.array([2 * 1 - 0.5 * 1, 2 * 0, -0.5 * 3], np.float32))
    alone = Settler({"never": RewardConfig(function="f")}, RewardWorkersConfig())
    assert math.isnan(alone.settle(group("5"), {"never": good(None)}).rewards[0])


@pytest.mark.parametrize(
    ("on_error", "rewards", "part"),
    [
        ("none", [1 + 1, 2], (1.0, None)),
        ("zero", [1 + 1, 0 + 2], (1.0, 0.0)),
        ("drop_sample", [1 + 1, math.nan], (1.0, None)),
        ("drop_group", [math.nan, math.nan], (1.0, None)),
    ],
)
def test_what_a_failed_call_counts_as(
    on_error: str, rewards: list[float], part: tuple[float | None, ...]
) -> None:
    scored = settle(on_error, Verdict(value=1.0), BAD)
    np.testing.assert_array_equal(scored.rewards, np.array(rewards, np.float32))
    assert scored.parts["f"] == part
    assert scored.verdicts["f"][1] == BAD


def test_failures_that_end_the_run() -> None:
    with pytest.raises(RewardError, match=r"^reward f: it broke$"):
        settle("fail", Verdict(value=1.0), BAD)
    with pytest.raises(RewardError, match="on_error zero holds after the first 2 calls"):
        settle("zero", Verdict(value=1.0), BAD, loud_calls=2)
    assert settle("zero", Verdict(value=1.0), BAD, loud_calls=1).parts["f"] == (1.0, 0.0)


def test_a_late_call_has_a_rule_of_its_own() -> None:
    late = Verdict(error="reward f: no answer", timed_out=True)

    def rewards(verdict: Verdict, function: str = "f", **options: Any) -> list[float]:
        settler = Settler({"f": RewardConfig(function=function, **options)}, RewardWorkersConfig())
        return settler.settle(group("a"), {"f": [verdict]}).rewards.tolist()

    # Not among the calls that fail loudly.
    assert rewards(late, on_timeout="zero") == [0.0]
    assert rewards(late, function="math_boxed") == [0.0]
    for verdict, options in ((late, {}), (BAD, {"on_timeout": "zero"}), (late, {"on_timeout": "fail"})):
        with pytest.raises(RewardError):
            rewards(verdict, **options)


def test_too_many_failures_end_the_run() -> None:
    settings = RewardWorkersConfig(loud_calls=0, error_window=10, max_error_ratio=0.2)
    settler = Settler({"f": RewardConfig(function="f", on_error="none")}, settings)
    one = group("a")
    for number in range(40):
        settler.settle(one, {"f": [BAD if number % 5 == 0 else Verdict(value=1.0)]})
    # Calls 30 and 35 of the last ten failed; this one pushes the first of them out, the next one none.
    settler.settle(one, {"f": [BAD]})
    with pytest.raises(RewardError, match=r"reward f: 3 of its last 10 calls failed.*it broke"):
        settler.settle(one, {"f": [BAD]})


def test_spans_credit_tokens() -> None:
    settler = Settler({"f": RewardConfig(function="f", weight=2.0)}, RewardWorkersConfig())
    spans = (Span(start=0, end=2, value=0.5), Span(start=1, end=2, value=-1.0))
    scored = settler.settle(group("a", "b"), {"f": [Verdict(value=1.0, spans=spans), Verdict(value=1.0)]})
    assert [row.tolist() for row in scored.credits] == [[1.0, -1.0], [0.0, 0.0]]
    with pytest.raises(
        RewardError, match="completion 0: gave a span from token 1 to 3; the completion has 2"
    ):
        settler.settle(group("a"), {"f": [Verdict(value=1.0, spans=(Span(start=1, end=3, value=1.0),))]})
    assert settler.settle(group("a"), {"f": good(1.0)}).credits == ()


def test_what_the_environment_gave_is_a_reward() -> None:
    first, second, third = group("a", "b", "c").rollouts
    given = [replace(first, environment_reward=2.0), second, replace(third, environment_reward=-1.0)]
    whole = replace(group("a", "b", "c"), rollouts=tuple(given))
    said = {"r": [Verdict(value=1.0), Verdict(), Verdict()]}
    scored = Settler({"r": RewardConfig(function="r")}, RewardWorkersConfig(), environment_weight=0.5).settle(
        whole, said
    )
    np.testing.assert_array_equal(scored.rewards, [2.0, np.nan, -0.5])
    assert scored.parts["environment"] == (2.0, 0.0, -1.0)
    alone = Settler({}, RewardWorkersConfig(), environment_weight=0.5).settle(whole, {})
    np.testing.assert_array_equal(alone.rewards, [1.0, 0.0, -0.5])
