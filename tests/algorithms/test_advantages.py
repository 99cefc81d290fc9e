"""Advantages against the formulas written out with the statistics module."""

import statistics
from collections.abc import Sequence

import numpy as np
import pytest

from algorithms.advantages import advantages_of, has_signal
from algorithms.data import Group, Prompt, Rollout, Scored, float_row, int_row
from configs.grpo import GRPOConfig

NAN = float("nan")
FIRST, SECOND = [1.0, 0.0, 0.5, 1.0], [4.0, 2.0, 2.0, 0.0]
LENGTHS = [[1, 2, 3, 4], [5, 1, 1, 1]]


def group(
    rewards: Sequence[float], lengths: Sequence[int], parts: Sequence[Sequence[float | None]] = ()
) -> Scored:
    rollouts = tuple(
        Rollout(
            tokens=int_row([7] * length),
            logprobs=float_row([-1.0] * length),
            text="",
            finish="stop",
            loss_mask=int_row([1] * length),
            versions=(0, 0),
        )
        for length in lengths
    )
    prompt = Prompt(id="p", tokens=int_row([1]), messages=(), columns={})
    return Scored(
        group=Group(prompt=prompt, rollouts=rollouts),
        rewards=float_row(rewards),
        parts={f"r{number}": tuple(values) for number, values in enumerate(parts)},
        weights={"r0": 1.0, "r1": 0.5},
    )


def advantages(**settings: object) -> list[list[float]]:
    groups = [group(FIRST, LENGTHS[0]), group(SECOND, LENGTHS[1])]
    found = advantages_of(groups, [each.rewards for each in groups], GRPOConfig.model_validate(settings))
    return [row.tolist() for row in found]


def check(found: list[list[float]], want: list[list[float]]) -> None:
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


def test_grpo_is_the_distance_from_the_mean_over_the_deviation_asked_for() -> None:
    centred = [[value - statistics.fmean(row) for value in row] for row in (FIRST, SECOND)]
    check(advantages(scale_rewards="none"), centred)
    by_group = [
        [value / (statistics.stdev(raw) + 1e-4) for value in row]
        for row, raw in zip(centred, (FIRST, SECOND), strict=True)
    ]
    check(advantages(), by_group)
    spread = statistics.stdev([*FIRST, *SECOND]) + 1e-4
    check(advantages(scale_rewards="batch"), [[value / spread for value in row] for row in centred])


def test_rloo_compares_with_the_mean_of_the_others_and_is_not_scaled_by_default() -> None:
    want = [[row[i] - statistics.fmean(row[:i] + row[i + 1 :]) for i in range(4)] for row in (FIRST, SECOND)]
    check(advantages(advantage_estimator="rloo"), want)
    scaled = [
        [value / (statistics.stdev(raw) + 1e-4) for value in row]
        for row, raw in zip(want, (FIRST, SECOND), strict=True)
    ]
    check(advantages(advantage_estimator="rloo", scale_rewards="group"), scaled)


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_plus_plus_whitens_over_the_tokens_of_the_batch(baseline: bool) -> None:
    rows = [FIRST, SECOND]
    if baseline:
        rows = [[value - statistics.fmean(row) for value in row] for row in rows]
    tokens = [
        value
        for row, lengths in zip(rows, LENGTHS, strict=True)
        for value, length in zip(row, lengths, strict=True)
        for _ in range(length)
    ]
    mean, deviation = statistics.fmean(tokens), statistics.stdev(tokens) + 1e-4
    want = [[(value - mean) / deviation for value in row] for row in rows]
    name = "reinforce_plus_plus_baseline" if baseline else "reinforce_plus_plus"
    check(advantages(advantage_estimator=name), want)


def test_gdpo_normalizes_each_function_by_itself_and_whitens_the_sum() -> None:
    parts = [[1.0, 0.0, 1.0, 0.0], [5.0, None, 5.0, 2.0]]
    groups = [group([3.5, 0.0, 3.5, 1.0], [1] * 4, parts)]
    settings = GRPOConfig(advantage_estimator="gdpo")
    (found,) = advantages_of(groups, [groups[0].rewards], settings)
    first = [(value - 0.5) / (statistics.stdev([1.0, 0.0, 1.0, 0.0]) + 1e-4) for value in (1, 0, 1, 0)]
    known = [5.0, 5.0, 2.0]
    second = [
        0.0 if value is None else (value - 4.0) / (statistics.stdev(known) + 1e-4) for value in parts[1]
    ]
    total = [a + 0.5 * b for a, b in zip(first, second, strict=True)]
    mean, deviation = statistics.fmean(total), statistics.stdev(total) + 1e-4
    np.testing.assert_allclose(found, [(value - mean) / deviation for value in total], rtol=1e-5)


def test_gdpo_leaves_out_what_functions_said_of_a_completion_without_reward() -> None:
    """As of one that was aborted: the group is then as if it had never been."""
    settings = GRPOConfig(advantage_estimator="gdpo")
    with_gap = group([2.5, NAN, 0.0, 1.5], [1] * 4, [[1.0, 9.0, 0.0, 0.5], [3.0, -7.0, 0.0, None]])
    without = group([2.5, 0.0, 1.5], [1] * 3, [[1.0, 0.0, 0.5], [3.0, 0.0, None]])
    (found,) = advantages_of([with_gap], [with_gap.rewards], settings)
    (want,) = advantages_of([without], [without.rewards], settings)
    assert found[1] == 0
    np.testing.assert_allclose(found[[0, 2, 3]], want, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_a_completion_without_reward_changes_nothing_for_the_others_and_gets_zero(estimator: str) -> None:
    settings = GRPOConfig.model_validate({"advantage_estimator": estimator})
    with_gap = [group([2.0, NAN, 0.0, 1.5], [3, 9, 1, 2])]
    without = [group([2.0, 0.0, 1.5], [3, 1, 2])]
    (found,) = advantages_of(with_gap, [with_gap[0].rewards], settings)
    (want,) = advantages_of(without, [without[0].rewards], settings)
    assert found[1] == 0
    np.testing.assert_allclose(found[[0, 2, 3]], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [([1, 1, 1], False), ([0, 1], True), ([NAN, 1], False), ([NAN, NAN], False), ([NAN, 1, 0], True)],
)
def test_only_groups_with_differing_rewards_have_signal(rewards: list[float], signal: bool) -> None:
    each = group(rewards, [1] * len(rewards))
    assert has_signal(each.rewards) is signal
    if not signal:
        (found,) = advantages_of([each], [each.rewards], GRPOConfig())
        assert np.all(found == 0)
