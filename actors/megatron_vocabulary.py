"""Logits whose vocabulary is split over tensor-parallel ranks: whose entries are whose, and sums over all."""

import math

import torch
import torch.distributed as dist

_CHUNK_ELEMENTS = 16 << 20


def share_of(logits_TV: torch.Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Number of the first token of this rank's equal share, and how many entries of it are no padding.

    Shares are in rank order; `group` is None where the vocabulary is not split.
    """
    width = logits_TV.shape[1]
    start = 0 if group is None else dist.get_rank(group) * width
    return start, max(0, min(width, vocab_size - start))


def softmax_total(
    logits_TV: torch.Tensor, temperature: float, kept: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Float32 [T]: the logarithm of the sum of exp(logits / temperature) over the whole vocabulary.

    Of this rank's share only the first `kept` entries count. No gradient.
    """
    tops: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for rows in row_chunks(logits_TV):
        scaled = logits_TV[rows, :kept].float() / temperature
        tops.append(scaled.amax(dim=1) if kept else scaled.new_full((len(scaled),), -math.inf))
        sums.append((scaled - tops[-1][:, None]).exp_().sum(dim=1))
    top_T, sum_T = torch.cat(tops), torch.cat(sums)
    if group is not None:
        local_top_T = top_T.clone()
        dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
        sum_T *= (local_top_T - top_T).exp_()
        dist.all_reduce(sum_T, group=group)
    return top_T + sum_T.log()


def row_chunks(logits_TV: torch.Tensor) -> list[slice]:
    """Slices of tokens, few enough that a float32 copy of their logits is small."""
    tokens = max(1, _CHUNK_ELEMENTS // max(1, logits_TV.shape[1]))
    return [slice(start, start + tokens) for start in range(0, logits_TV.shape[0], tokens)]
