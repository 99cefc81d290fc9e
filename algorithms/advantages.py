"""From rewards of a group to advantages of its completions."""

from typing import Literal

import numpy as np

from algorithms.data import FloatRow, float_row

_EPSILON = 1e-4


def group_advantages(rewards_K: FloatRow, scale: Literal["group", "none"]) -> FloatRow:
    """(R - mean) / (std + 1e-4) over the K completions of a group; without the division for `none`.

    The standard deviation is the unbiased one, as in TRL and ms-swift. Completions without a reward (NaN)
    are left out of mean and deviation and get advantage 0. Source: Shao et al. 2024 (DeepSeekMath), 4.1.
    """
    known_K = ~np.isnan(rewards_K)
    known = rewards_K[known_K].astype(np.float64)
    advantages_K = np.zeros(rewards_K.shape, dtype=np.float64)
    if known.size >= 2:
        centred = known - known.mean()
        advantages_K[known_K] = centred / (known.std(ddof=1) + _EPSILON) if scale == "group" else centred
    return float_row(advantages_K)


def has_signal(rewards_K: FloatRow) -> bool:
    """Whether the rewards differ at all; without that the policy term is zero (a KL term is not)."""
    known = rewards_K[~np.isnan(rewards_K)]
    return known.size >= 2 and bool(np.any(known != known[0]))
