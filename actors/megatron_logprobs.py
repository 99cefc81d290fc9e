"""Log-probabilities of labels, and entropies, from logits whose vocabulary is split over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist

from actors.megatron_vocabulary import row_chunks, share_of


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
    start, kept = share_of(logits_TV, vocab_size, group)
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
            for rows in row_chunks(logits_TV)
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
        of_logprob_T, of_entropy_T = grad_outputs
        if of_logprob_T is None:
            of_logprob_T = torch.zeros_like(of_entropy_T)
        grad_TV = torch.zeros_like(logits_TV)
        for rows in row_chunks(logits_TV):
            # The first operation makes the copy: `float` of float32 logits are the logits themselves.
            log_p = (logits_TV[rows, : ctx.kept].float() / ctx.temperature).sub_(log_total_T[rows, None])
            slope_T = of_logprob_T[rows, None] / ctx.temperature
            if of_entropy_T is None:
                grad = log_p.exp_().mul_(-slope_T)
            else:
                # d entropy / d logit = -p (log p + entropy).
                grad = log_p.exp().neg_()
                log_p.add_(entropy_T[rows, None]).mul_(of_entropy_T[rows, None] / ctx.temperature)
                grad.mul_(log_p.add_(slope_T))
            if ctx.kept:
                grad.scatter_add_(1, labels_T[rows, None], torch.where(mine_T[rows, None], slope_T, 0.0))
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
