import statistics

import numpy as np
import pytest

from algorithms.advantages import group_advantages, has_signal
from algorithms.data import float_row

NAN = float("nan")


def test_group_advantages_equal_the_formula_written_out() -> None:
    rewards = [1.0, 0.0, 0.5, 1.0]
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    expected = [(reward - mean) / (deviation + 1e-4) for reward in rewards]
    np.testing.assert_allclose(group_advantages(float_row(rewards), "group"), expected, rtol=1e-6)


def test_without_scaling_advantages_are_the_distance_from_the_mean() -> None:
    np.testing.assert_allclose(group_advantages(float_row([3.0, 0.0]), "none"), [1.5, -1.5])


def test_a_completion_without_reward_is_left_out_of_the_mean_and_gets_zero() -> None:
    advantages = group_advantages(float_row([2.0, NAN, 0.0]), "none")
    np.testing.assert_allclose(advantages, [1.0, 0.0, -1.0])


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [([1, 1, 1], False), ([0, 1], True), ([NAN, 1], False), ([NAN, NAN], False), ([NAN, 1, 0], True)],
)
def test_only_groups_with_differing_rewards_have_signal(rewards: list[float], signal: bool) -> None:
    row = float_row(rewards)
    assert has_signal(row) is signal
    if not signal:
        assert np.all(group_advantages(row, "group") == 0)
