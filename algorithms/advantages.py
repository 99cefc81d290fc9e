"""From rewards to advantages of completions, one value for all tokens of each."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from algorithms.data import FloatRow, Scored, float_row
from configs.grpo import GRPOConfig

_EPSILON = 1e-4
Row = NDArray[np.float64]


def advantages_of(
    groups: Sequence[Scored], rewards: Sequence[FloatRow], settings: GRPOConfig
) -> list[FloatRow]:
    """Advantages [K] of the completions of each group, by `settings.advantage_estimator`.

    `rewards` are those of the groups, after whatever was added to them; NaN marks a completion without a
    reward, which is left out of every mean and deviation and gets 0. Deviations are the unbiased ones,
    as in TRL and ms-swift.

    Sources: Shao et al. 2024 (grpo), Ahmadian et al. 2024 (rloo), Hu et al. 2025 (REINFORCE++, its baseline
    form), Liu et al. 2026 (gdpo), Liu et al. 2025 (Dr. GRPO: no deviation). See docs/algorithms.md.
    """
    if not groups:
        return []
    values = [row.astype(np.float64) for row in rewards]
    match settings.advantage_estimator:
        case "grpo" | "rloo":
            centred = [_centred(row) for row in values]
            if settings.advantage_estimator == "rloo":
                centred = [row * _leave_one_out(row) for row in centred]
            found = _scaled(centred, values, settings)
        case "reinforce_plus_plus":
            found = _whitened(values, _loss_tokens(groups))
        case "reinforce_plus_plus_baseline":
            found = _whitened([_centred(row) for row in values], _loss_tokens(groups))
        case "gdpo":
            found = _whitened([_by_function(each) for each in groups], None)
    return [float_row(np.nan_to_num(row, nan=0.0)) for row in found]


def has_signal(rewards_K: FloatRow) -> bool:
    """Whether the rewards differ at all; without that the policy term is zero (a KL term is not)."""
    known = rewards_K[~np.isnan(rewards_K)]
    return known.size >= 2 and bool(np.any(known != known[0]))


def values_by_function(scored: Scored) -> list[Row]:
    """What each function said of the completions [K]: NaN for None, and where the completion has no reward at
    all, as one that was aborted, whatever functions said of its piece."""
    unknown_K = np.isnan(scored.rewards)
    rows = [
        np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        for values in scored.parts.values()
    ]
    return [np.where(unknown_K, np.nan, row_K) for row_K in rows]


def _centred(row_K: Row) -> Row:
    """Less their mean; all zero when the group knows one reward only, which there is nothing to compare with."""
    known_K = ~np.isnan(row_K)
    if known_K.sum() < 2:
        return np.where(known_K, 0.0, np.nan)
    return row_K - row_K[known_K].mean()


def _leave_one_out(row_K: Row) -> float:
    """From the distance to the mean of all K to that of the K - 1 others."""
    known = int((~np.isnan(row_K)).sum())
    return known / (known - 1) if known > 1 else 1.0


def _scaled(centred: Sequence[Row], rewards: Sequence[Row], settings: GRPOConfig) -> list[Row]:
    match settings.reward_scale:
        case "none":
            return list(centred)
        case "group":
            return [row / (_deviation(raw) + _EPSILON) for row, raw in zip(centred, rewards, strict=True)]
        case "batch":
            spread = _deviation(np.concatenate(list(rewards)))
            return [row / (spread + _EPSILON) for row in centred]


def _by_function(group: Scored) -> Row:
    """Each function's values, normalized in the group by themselves; None counts as no deviation from the mean."""
    total = np.zeros(len(group.group.rollouts))
    for name, row in zip(group.parts, values_by_function(group), strict=True):
        total += group.weights.get(name, 1.0) * np.nan_to_num(
            _centred(row) / (_deviation(row) + _EPSILON), nan=0.0
        )
    return np.where(np.isnan(group.rewards), np.nan, total)


def _whitened(rows: Sequence[Row], counts: Sequence[Row] | None) -> list[Row]:
    """Less their mean and over their deviation, over all groups; each value counts `counts` times, or once."""
    flat = np.concatenate(list(rows))
    times = np.ones(flat.shape) if counts is None else np.concatenate(list(counts))
    times = np.where(np.isnan(flat), 0.0, times)
    known = np.nan_to_num(flat, nan=0.0)
    total = times.sum()
    if total < 2:
        return [np.zeros(row.shape) for row in rows]
    mean = float((known * times).sum() / total)
    deviation = float(np.sqrt((times * (known - mean) ** 2).sum() / (total - 1)))
    return [(row - mean) / (deviation + _EPSILON) for row in rows]


def _loss_tokens(groups: Sequence[Scored]) -> list[Row]:
    """Loss tokens of each completion: a value that all of them share counts that often."""
    return [np.array([float(rollout.loss_mask.sum()) for rollout in each.group.rollouts]) for each in groups]


def _deviation(row: Row) -> float:
    known = row[~np.isnan(row)]
    return float(known.std(ddof=1)) if known.size >= 2 else 0.0
