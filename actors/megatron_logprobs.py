"""Log-probabilities of labels, and entropies, from logits whose vocabulary is split over tensor-parallel ranks."""

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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of softmax(logits / temperature), float32 [T]: log-probabilities of `labels_T`; entropies in nats.

    `logits_TV` is this rank's equal share of the padded vocabulary, in rank order; entries from `vocab_size`
    on are padding and have probability zero. All arithmetic is float32, a few tokens at a time, so that no
    second copy of the logits exists until the backward pass writes their gradient. The gradient of both
    results must be the same on all ranks of `group` (None: the vocabulary is not split).
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mine_T = (local_labels_T >= 0) & (local_labels_T < kept)
        labels_T = torch.where(mine_T, local_labels_T, 0)
        parts = [
            _sums(logits_TV[rows, :kept].float() / temperature, labels_T[rows], mine_T[rows])
            for rows in _chunks(logits_TV)
        ]
        top_T, sum_T, weighted_T, picked_T = (torch.cat(each) for each in zip(*parts, strict=True))
        if group is not None:
            local_top_T = top_T.clone()
            dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
            shrunk_T = (local_top_T - top_T).exp_()
            all_sums = torch.stack([sum_T * shrunk_T, weighted_T * shrunk_T, picked_T])
            dist.all_reduce(all_sums, group=group)
            sum_T, weighted_T, picked_T = all_sums.unbind()
        log_total_T = top_T + sum_T.log()
        entropy_T = log_total_T - weighted_T / sum_T
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_TV, labels_T, mine_T, log_total_T, entropy_T)
        ctx.temperature, ctx.kept = temperature, kept
        return picked_T - log_total_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        logits_TV, labels_T, mine_T, log_total_T, entropy_T = ctx.saved_tensors
        of_logprob_T, of_entropy_T = (
            None if grad_T is None else grad_T / ctx.temperature for grad_T in grad_outputs
        )
        grad_TV = torch.zeros_like(logits_TV)
        for rows in _chunks(logits_TV):
            log_p = logits_TV[rows, : ctx.kept].float().div_(ctx.temperature).sub_(log_total_T[rows, None])
            p = log_p.exp()
            grad = torch.zeros_like(p)
            if of_entropy_T is not None:
                # d entropy / d logit = -p (log p + entropy).
                grad -= log_p.add_(entropy_T[rows, None]).mul_(p).mul_(of_entropy_T[rows, None])
            if of_logprob_T is not None:
                grad -= p.mul_(of_logprob_T[rows, None])
                if ctx.kept:
                    at_label = torch.where(mine_T[rows], of_logprob_T[rows], 0.0)
                    grad.scatter_add_(1, labels_T[rows, None], at_label[:, None])
            grad_TV[rows, : ctx.kept] = grad
        return grad_TV, None, None, None, None


def _sums(scaled: torch.Tensor, labels: torch.Tensor, mine: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of each token: the largest logit, the sum of exp(logit - largest), the same weighted by the logits, and
    the label's logit where it is in this part of the vocabulary, else 0."""
    if not scaled.shape[1]:
        nothing = scaled.new_zeros(scaled.shape[0])
        return nothing.new_full(nothing.shape, float("-inf")), nothing, nothing, nothing
    top = scaled.amax(dim=1)
    picked = scaled.gather(1, labels[:, None])[:, 0].masked_fill_(~mine, 0.0)
    weights = (scaled - top[:, None]).exp_()
    total = weights.sum(dim=1)
    return top, total, weights.mul_(scaled).sum(dim=1), picked


def _chunks(logits_TV: torch.Tensor) -> list[slice]:
    tokens = max(1, _CHUNK_ELEMENTS // max(1, logits_TV.shape[1]))
    return [slice(start, start + tokens) for start in range(0, logits_TV.shape[0], tokens)]
