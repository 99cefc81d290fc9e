"""Sums over the sequences of a packed row."""

from typing import Any

import numpy as np
import torch

from algorithms.data import MicroBatch


class Sequences:
    """The sequences of a micro-batch, for values that all tokens of a sequence share."""

    def __init__(self, micro: MicroBatch, mask_T: torch.Tensor) -> None:
        """`mask_T` is 1 where a token counts."""
        sizes = torch.as_tensor(np.diff(micro.starts_S), dtype=torch.int64, device=mask_T.device)
        self._owner_T = torch.repeat_interleave(torch.arange(len(sizes), device=mask_T.device), sizes)
        self._mask_T = mask_T
        self._count_S = self._sums(mask_T, len(sizes))

    def total(self, row_T: torch.Tensor) -> torch.Tensor:
        """At each token the sum of `row_T` over the tokens that count in its sequence."""
        return self._sums(row_T * self._mask_T, len(self._count_S))[self._owner_T]

    def mean(self, row_T: torch.Tensor) -> torch.Tensor:
        """At each token the mean of `row_T` over the tokens that count in its sequence; 0 where none does."""
        return self.total(row_T) / self._count_S.clamp(min=1)[self._owner_T]

    def _sums(self, row_T: torch.Tensor, size: int) -> torch.Tensor:
        return row_T.new_zeros(size).index_add(0, self._owner_T, row_T)


def loss_weights(micro: MicroBatch, mask_T: torch.Tensor) -> torch.Tensor:
    """What the term of each token counts in the loss: its weight, or 1 on the loss mask."""
    return mask_T if micro.weights_T is None else row(micro.weights_T, mask_T)


def row(values: Any, like: torch.Tensor) -> torch.Tensor:
    """A numpy row as a tensor of the type of `like`, on its device."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def masked(values_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Zero off the mask, before any exp: rows there hold padding, and inf times a zero mask is NaN."""
    return torch.where(mask_T > 0, values_T, torch.zeros_like(values_T))
