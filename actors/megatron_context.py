"""What a context-parallel rank has of a micro-batch, and the way back to its whole row.

Every sequence is cut into 2 CP equal chunks, and rank r has the chunks r and 2 CP - 1 - r: so all see as much of
the causal triangle. Transformer Engine and Megatron's rotary embedding split packed sequences the same way.
Sequences that do not divide are filled up with tokens that none of theirs sees. That is done here, so that nothing
outside of the trainer ranks depends on their number.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from numpy.typing import NDArray

from algorithms.data import IntRow, MicroBatch, int_row
from configs.errors import BasculeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which tokens of a row of T tokens context-parallel rank `rank` of R has, L of them.

    `tokens_RL` has for every place of every rank the token in the row, or T where there is none.
    """

    tokens_RL: NDArray[np.int64]
    rank: int
    group: Any

    def places(self, tokens: int) -> NDArray[np.int64]:
        """Of each of the row's `tokens`, its place in what all ranks have, one rank after the other."""
        return np.argsort(self.tokens_RL.ravel(), kind="stable")[:tokens]


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextShare:
    """A micro-batch, and which part of its row this rank has: all of it without context parallelism.

    `starts_S` are where sequences start once they are filled up, and at its end how long the row then is.
    """

    batch: MicroBatch
    starts_S: IntRow
    split: Split | None = None

    def mine(self, rows: NDArray[Any]) -> NDArray[Any]:
        """This rank's part [L, ...] of rows [T, ...]; zeros in places that hold no token."""
        if self.split is None:
            return rows
        blank = np.zeros((1, *rows.shape[1:]), rows.dtype)
        return np.concatenate([rows, blank])[self.split.tokens_RL[self.split.rank]]

    def filled(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows [..., T] of the whole row once sequences are filled up; zeros in places that hold no token."""
        if self.split is None:
            return rows
        row = np.zeros((*rows.shape[:-1], int(self.starts_S[-1])), rows.dtype)
        for (start, end), place in zip(pairwise(self.batch.starts_S), self.starts_S, strict=False):
            row[..., place : place + end - start] = rows[..., start:end]
        return row

    def whole(self, mine: torch.Tensor) -> torch.Tensor:
        """Rows [T, ...] of which every context-parallel rank has a part [L, ...]; all must call it.

        The gradient of the result must be the same on all of them, as that of a loss is which all compute.
        """
        if self.split is None:
            return mine
        everything = gather_from_sequence_parallel_region(
            mine.contiguous(), tensor_parallel_output_grad=False, group=self.split.group
        )
        places_T = self.split.places(self.batch.tokens_T.size)
        return everything[torch.from_numpy(places_T).to(mine.device)]


def shares_of(micro_batches: Sequence[MicroBatch], config: TransformerConfig) -> list[ContextShare]:
    """This rank's part of every micro-batch, all of one length, as pipeline stages and parallel ranks need it.

    Raises BasculeError when rows are not of one length, or do not split over sequence-parallel ranks.
    """
    length = _row_length(micro_batches)
    tensor = config.tensor_model_parallel_size if config.sequence_parallel else 1
    ranks = config.context_parallel_size
    if ranks == 1:
        if length % tensor:
            raise BasculeError(
                f"rows of {length} tokens do not split over {tensor} sequence-parallel ranks; "
                f"pack them to a multiple of tensor_model_parallel_size"
            )
        return [ContextShare(batch=batch, starts_S=batch.starts_S) for batch in micro_batches]
    filled = [_filled(batch.starts_S, 2 * ranks) for batch in micro_batches]
    longest = max(int(starts[-1]) for starts in filled)
    longest += -longest % (ranks * lcm(2, tensor))
    group: Any = parallel_state.get_context_parallel_group()
    return [
        ContextShare(
            batch=batch,
            starts_S=int_row(starts if starts[-1] == longest else [*starts, longest]),
            split=Split(
                tokens_RL=tokens_of_ranks(batch.starts_S, ranks, longest), rank=group.rank(), group=group
            ),
        )
        for batch, starts in zip(micro_batches, filled, strict=True)
    ]


def tokens_of_ranks(starts_S: IntRow, ranks: int, length: int) -> NDArray[np.int64]:
    """Tokens [R, length / R] that each rank has of a row whose sequences start at `starts_S`, filled up to
    `length`; the number of tokens in the row stands for none."""
    tokens = int(starts_S[-1])
    filled = _filled(starts_S, 2 * ranks)
    row = np.full(length, tokens)
    for (start, end), place in zip(pairwise(starts_S), filled, strict=False):
        row[place : place + end - start] = np.arange(start, end)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(ranks)]
    for start, end in pairwise([*filled, length]):
        chunks = row[start:end].reshape(2 * ranks, -1)
        for rank, part in enumerate(parts):
            part += [chunks[rank], chunks[-1 - rank]]
    return np.stack([np.concatenate(part) for part in parts])


def _filled(starts_S: IntRow, multiple: int) -> NDArray[np.int64]:
    sizes = np.diff(starts_S).astype(np.int64)
    return np.cumsum([0, *(sizes + -sizes % multiple)])


def _row_length(micro_batches: Sequence[MicroBatch]) -> int:
    lengths = {len(batch.tokens_T) for batch in micro_batches}
    if len(lengths) != 1:
        raise BasculeError(f"micro-batches have rows of {sorted(lengths)} tokens; pack them to one length")
    (length,) = lengths
    return length
