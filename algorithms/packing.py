"""Samples into rows: packed micro-batches of equal length for every data-parallel rank."""

import heapq
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from algorithms.data import Batch, FloatRow, MicroBatch, TrainSample, float_row, int_row


def pack(samples: Sequence[TrainSample], *, num_ranks: int, micro_batch_size: int, multiple: int) -> Batch:
    """One optimizer step's batch: up to `micro_batch_size` samples in each row, all rows of one length.

    Every rank gets as many rows as the others (the pipeline's collectives need that); the length is the
    longest row's, rounded up to `multiple`. Samples go where the fewest tokens are, longest first, so rows
    come out nearly equal. Raises ValueError when there is no sample or nothing to train on.
    """
    if not samples:
        raise ValueError("pack needs at least one sample")
    num_loss_tokens = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    if num_loss_tokens == 0:
        raise ValueError("no sample has a token to train on")
    rows = -(-len(samples) // (num_ranks * micro_batch_size))
    bins = _balance(samples, num_ranks * rows, micro_batch_size)
    longest = max(sum(sample.tokens.size for sample in held) for held in bins)
    length = -(-longest // multiple) * multiple
    packed = [_pack_row(held, length) for held in bins]
    ranks = tuple(tuple(packed[rank::num_ranks]) for rank in range(num_ranks))
    return Batch(ranks=ranks, num_loss_tokens=num_loss_tokens)


Rows = tuple[tuple[FloatRow, ...], ...]


def with_logprobs(batch: Batch, *, old: Rows | None = None, reference: Rows | None = None) -> Batch:
    """The batch with the log-probabilities filled in that were computed for it, by rank and micro-batch."""
    ranks = tuple(
        tuple(
            replace(
                micro,
                old_logprobs_T=old[rank][row] if old else micro.old_logprobs_T,
                ref_logprobs_T=reference[rank][row] if reference else micro.ref_logprobs_T,
            )
            for row, micro in enumerate(micros)
        )
        for rank, micros in enumerate(batch.ranks)
    )
    return replace(batch, ranks=ranks)


def _balance(samples: Sequence[TrainSample], bins: int, capacity: int) -> list[list[TrainSample]]:
    held: list[list[TrainSample]] = [[] for _ in range(bins)]
    lightest = [(0, index) for index in range(bins)]
    order = sorted(range(len(samples)), key=lambda index: (-samples[index].tokens.size, index))
    for index in order:
        tokens, target = heapq.heappop(lightest)
        held[target].append(samples[index])
        if len(held[target]) < capacity:
            heapq.heappush(lightest, (tokens + samples[index].tokens.size, target))
    return held


def _pack_row(samples: Sequence[TrainSample], length: int) -> MicroBatch:
    lengths = [sample.tokens.size for sample in samples]
    padding = length - sum(lengths)
    pieces = [*lengths, padding] if padding else lengths
    fill_int, fill_float = np.zeros(padding, np.int32), np.zeros(padding, np.float32)

    def shifted(row: np.ndarray) -> np.ndarray:
        """Entry t of the result is entry t + 1: what belongs to a token moves to where it is predicted."""
        return np.append(row[1:], row.dtype.type(0))

    return MicroBatch(
        tokens_T=int_row(np.concatenate([*(s.tokens for s in samples), fill_int])),
        labels_T=int_row(np.concatenate([*(shifted(s.tokens) for s in samples), fill_int])),
        positions_T=int_row(np.concatenate([np.arange(size) for size in pieces])),
        starts_S=int_row(np.cumsum([0, *pieces])),
        loss_mask_T=int_row(np.concatenate([*(shifted(s.loss_mask) for s in samples), fill_int])),
        advantages_T=float_row(np.concatenate([*(shifted(s.advantages) for s in samples), fill_float])),
        logprobs_T=float_row(np.concatenate([*(shifted(s.logprobs) for s in samples), fill_float])),
    )
