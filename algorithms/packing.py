"""Samples into rows: packed micro-batches of equal length for every data-parallel rank, and back."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from algorithms.data import Batch, FloatRow, MicroBatch, TopTokens, TrainSample, float_row, int_row
from algorithms.vision import join_vision
from configs.errors import BasculeError
from configs.schema import TrainerConfig

Rows = tuple[tuple[FloatRow, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How terms of tokens become one loss: each counts 1, or 1 over the loss tokens of its sequence.

    The sum of all is divided by `denominator`, which is known before the first micro-batch.
    """

    per: Literal["token", "sequence"]
    denominator: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """What all rows of a batch have in common."""

    length: int
    padded: int | None
    """Without packing every sequence is padded to the longest."""
    present: frozenset[str]

    def size(self, sample: TrainSample) -> int:
        """Tokens that a sample takes in a row."""
        return self.padded or sample.tokens.size


_OPTIONAL = ("old_logprobs", "ref_logprobs", "policy_mask")


def pack(samples: Sequence[TrainSample], trainer: TrainerConfig, scaling: Scaling | None = None) -> Batch:
    """One optimizer step's batch; without `scaling` the loss is the mean over its loss tokens.

    A row holds up to `micro_batch_size` samples, or with `micro_batch_tokens` as many as fit. Every
    data-parallel rank gets as many rows as the others (the pipeline's collectives need that); all are as long
    as the longest, rounded up so that tensor-parallel ranks can share it. Samples go where the fewest tokens
    are, longest first, so rows come out nearly equal. Raises BasculeError when there is nothing to train on,
    or a sample is longer than `micro_batch_tokens`.
    """
    if not samples:
        raise BasculeError("there is no sample to train on")
    num_loss_tokens = sum(sample.num_loss_tokens for sample in samples)
    if num_loss_tokens == 0:
        raise BasculeError("no sample has a token to train on")
    scaling = scaling or Scaling(per="token", denominator=num_loss_tokens)
    replicas = trainer.data_parallel_size
    padded = None if trainer.packing else max(sample.tokens.size for sample in samples)
    sizes = [padded or sample.tokens.size for sample in samples]
    bins = _bins(sizes, trainer)
    length = max(sum(sizes[index] for index in held) for held in bins)
    length += -length % trainer.tensor_model_parallel_size
    present = frozenset(name for name in _OPTIONAL if getattr(samples[0], name) is not None)
    shape = _Shape(length=length, padded=padded, present=present)
    packed = [_pack_row([samples[index] for index in held], held, shape, scaling) for held in bins]
    ranks = tuple(tuple(packed[rank::replicas]) for rank in range(replicas))
    return Batch(ranks=ranks, num_loss_tokens=num_loss_tokens, denominator=scaling.denominator)


def unpack(batch: Batch, rows: Rows) -> list[FloatRow]:
    """Rows of predictions, by rank and micro-batch, as one row per packed sample, in the samples' order.

    Entry t of a sample's row belongs to its token t; nothing predicts the first, which gets 0.
    """
    found: dict[int, FloatRow] = {}
    for micros, of_rank in zip(batch.ranks, rows, strict=True):
        for micro, row in zip(micros, of_rank, strict=True):
            for number, start, end in zip(
                micro.samples_S, micro.starts_S[:-1], micro.starts_S[1:], strict=True
            ):
                if number >= 0:
                    found[number] = float_row(np.concatenate([[0.0], row[start : end - 1]]))
    return [found[number] for number in range(len(found))]


def with_top_tokens(batch: Batch, tops: Sequence[TopTokens]) -> Batch:
    """The batch with what a teacher says of each packed sample, in the samples' order."""
    k = max(top.ids.shape[1] for top in tops)

    def filled(micro: MicroBatch) -> MicroBatch:
        ids_TK = np.full((micro.tokens_T.size, k), -1, np.int32)
        logprobs_TK = np.zeros((micro.tokens_T.size, k), np.float32)
        for number, start in zip(micro.samples_S, micro.starts_S[:-1], strict=True):
            if number >= 0:
                # What belongs to a token moves to where it is predicted.
                ids, logprobs = tops[number].ids[1:], tops[number].logprobs[1:]
                place = slice(start, start + len(ids)), slice(0, ids.shape[1])
                ids_TK[place], logprobs_TK[place] = ids, logprobs
        return replace(micro, teacher_ids_TK=int_row(ids_TK), teacher_logprobs_TK=float_row(logprobs_TK))

    return replace(batch, ranks=tuple(tuple(map(filled, micros)) for micros in batch.ranks))


def _bins(sizes: Sequence[int], trainer: TrainerConfig) -> list[list[int]]:
    """Numbers of the samples of each row; a multiple of the replicas."""
    replicas, budget = trainer.data_parallel_size, trainer.micro_batch_tokens
    if budget is None:
        rows = -(-len(sizes) // (replicas * trainer.micro_batch_size)) * replicas
        bins = _balance(sizes, rows, trainer.micro_batch_size, None)
        assert bins is not None, "there is room for all"
        return bins
    if max(sizes) > budget:
        raise BasculeError(
            f"trainer.micro_batch_tokens: a sample has {max(sizes)} tokens, more than {budget}; raise it"
        )
    rows = -(-sum(sizes) // (replicas * budget)) * replicas
    while (bins := _balance(sizes, rows, len(sizes), budget)) is None:
        rows += replicas
    return bins


def _balance(sizes: Sequence[int], bins: int, capacity: int, budget: int | None) -> list[list[int]] | None:
    """The longest first into the lightest bin; None when one would get more than `budget`."""
    held: list[list[int]] = [[] for _ in range(bins)]
    lightest = [(0, index) for index in range(bins)]
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        tokens, target = heapq.heappop(lightest)
        tokens += sizes[index]
        if budget is not None and tokens > budget:
            return None
        held[target].append(index)
        if len(held[target]) < capacity:
            heapq.heappush(lightest, (tokens, target))
    return held


def _pack_row(
    samples: Sequence[TrainSample], numbers: Sequence[int], shape: _Shape, scaling: Scaling
) -> MicroBatch:
    sizes = [shape.size(sample) for sample in samples]
    starts = np.cumsum([0, *sizes])

    def placed(rows: Sequence[NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
        row = np.zeros((shape.length,), dtype)
        for start, part in zip(starts, rows, strict=False):
            row[start : start + part.size] = part
        row.flags.writeable = False
        return row

    def shifted(rows: Sequence[NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
        """What belongs to a token moves to where it is predicted."""
        return placed([row[1:] for row in rows], dtype)

    def optional(name: str, dtype: DTypeLike) -> Any:
        # A row without samples has what the other rows have, so that all are treated alike.
        return (
            shifted([getattr(sample, name) for sample in samples], dtype) if name in shape.present else None
        )

    spans, owners = _spans(samples, numbers, starts, shape.length)
    return MicroBatch(
        tokens_T=placed([sample.tokens for sample in samples], np.int32),
        labels_T=shifted([sample.tokens for sample in samples], np.int32),
        positions_T=int_row(np.concatenate([np.arange(end - start) for start, end in pairwise(spans)])),
        starts_S=int_row(spans),
        samples_S=owners,
        loss_mask_T=shifted([sample.loss_mask for sample in samples], np.int32),
        weights_T=shifted([_weights(sample, scaling) for sample in samples], np.float32),
        advantages_T=shifted([sample.advantages for sample in samples], np.float32),
        logprobs_T=shifted([sample.logprobs for sample in samples], np.float32),
        old_logprobs_T=optional("old_logprobs", np.float32),
        ref_logprobs_T=optional("ref_logprobs", np.float32),
        policy_mask_T=optional("policy_mask", np.int32),
        vision=join_vision([sample.vision for sample in samples], starts, shape.length),
    )


def _spans(
    samples: Sequence[TrainSample], numbers: Sequence[int], starts: NDArray[np.int64], length: int
) -> tuple[list[int], tuple[int, ...]]:
    """Where sequences start, with `length` at the end, and which sample each one is; padding is -1."""
    spans: list[int] = []
    owners: list[int] = []
    for start, following, sample, number in zip(starts, starts[1:], samples, numbers, strict=False):
        end = int(start) + sample.tokens.size
        spans.append(int(start))
        owners.append(number)
        if end < following:
            spans.append(end)
            owners.append(-1)
    used = int(starts[-1])
    if used < length:
        spans.append(used)
        owners.append(-1)
    return [*spans, length], tuple(owners)


def _weights(sample: TrainSample, scaling: Scaling) -> FloatRow:
    """What each token counts. In float64 until it is final: sequences may be long."""
    if scaling.per == "token":
        return float_row(sample.loss_mask)
    return float_row(sample.loss_mask / max(1, sample.num_loss_tokens))
