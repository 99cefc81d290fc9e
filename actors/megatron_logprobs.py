"""Log-probabilities of labels from logits whose vocabulary is split over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist

_CHUNK_ELEMENTS = 16 << 20


def vocab_parallel_logprobs(
    logits_TV: torch.Tensor,
    labels_T: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Float32 natural log-probabilities [T] of `labels_T` under softmax(logits / temperature).

    `logits_TV` is this rank's equal share of the padded vocabulary, in rank order; entries from `vocab_size`
    on are padding and have probability zero. All arithmetic is float32, a few tokens at a time, so that no
    second copy of the logits exists until the backward pass writes their gradient. The gradient of the result
    must be the same on all ranks of `group` (None: the vocabulary is not split).
    """
    rank = 0 if group is None else dist.get_rank(group)
    start = rank * logits_TV.shape[1]
    kept = max(0, min(logits_TV.shape[1], vocab_size - start))
    return _VocabParallelLogprobs.apply(logits_TV, labels_T - start, temperature, kept, group)  # pyright: ignore[reportReturnType]


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        local_labels_T: torch.Tensor,
        temperature: float,
        kept: int,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        mine_T = (local_labels_T >= 0) & (local_labels_T < kept)
        labels_T = torch.where(mine_T, local_labels_T, 0)
        tops, sums, picks = [], [], []
        for rows in _chunks(logits_TV):
            scaled = logits_TV[rows, :kept].float() / temperature
            top = scaled.amax(dim=1) if kept else scaled.new_full((scaled.shape[0],), float("-inf"))
            tops.append(top)
            sums.append((scaled - top[:, None]).exp_().sum(dim=1))
            picks.append(_pick(scaled, labels_T[rows], mine_T[rows]))
        top_T, sum_T, picked_T = torch.cat(tops), torch.cat(sums), torch.cat(picks)
        if group is not None:
            local_top_T = top_T.clone()
            dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
            sum_T *= (local_top_T - top_T).exp_()
            both = torch.stack([sum_T, picked_T])
            dist.all_reduce(both, group=group)
            sum_T, picked_T = both.unbind()
        log_total_T = top_T + sum_T.log()
        ctx.save_for_backward(logits_TV, labels_T, mine_T, log_total_T)
        ctx.temperature, ctx.kept = temperature, kept
        return picked_T - log_total_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        logits_TV, labels_T, mine_T, log_total_T = ctx.saved_tensors
        scale_T = grad_outputs[0] / ctx.temperature
        grad_TV = torch.zeros_like(logits_TV)
        for rows in _chunks(logits_TV):
            scaled = logits_TV[rows, : ctx.kept].float() / ctx.temperature
            grad = (scaled - log_total_T[rows, None]).exp_().mul_(-scale_T[rows, None])
            if ctx.kept:
                at_label = torch.where(mine_T[rows], scale_T[rows], 0.0)
                grad.scatter_add_(1, labels_T[rows, None], at_label[:, None])
            grad_TV[rows, : ctx.kept] = grad
        return grad_TV, None, None, None, None


def _pick(scaled: torch.Tensor, labels_T: torch.Tensor, mine_T: torch.Tensor) -> torch.Tensor:
    if not scaled.shape[1]:
        return scaled.new_zeros(scaled.shape[0])
    return scaled.gather(1, labels_T[:, None])[:, 0].masked_fill_(~mine_T, 0.0)


def _chunks(logits_TV: torch.Tensor) -> list[slice]:
    tokens = max(1, _CHUNK_ELEMENTS // max(1, logits_TV.shape[1]))
    return [slice(start, start + tokens) for start in range(0, logits_TV.shape[0], tokens)]
