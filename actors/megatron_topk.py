"""Divergence of a student from the few likeliest tokens of a teacher, and those tokens of a teacher's logits."""

import math
from typing import Any

import torch
import torch.distributed as dist

from actors.megatron_vocabulary import row_chunks, share_of, softmax_total

# Stands in for the logarithm of zero where minus infinity would make NaN of a product with zero.
_NEVER = -1e4


def topk_divergence(
    student_TV: torch.Tensor,
    ids_TK: torch.Tensor,
    logprobs_TK: torch.Tensor,
    *,
    beta: float,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    tail: bool = False,
) -> torch.Tensor:
    """Float32 divergence [T] of the student from a teacher of which K tokens are known at each position.

    `logprobs_TK` are the teacher's natural log-probabilities at temperature 1; a negative id is no token, and a
    position without any token has divergence zero. Both distributions are those among the K tokens, at
    `temperature`; with `tail` one more outcome stands for all other tokens, which needs a temperature of 1. The
    formula is that of vocab_parallel_divergence, as is what is said there of logits, groups and gradients.
    """
    assert not tail or temperature == 1, "the tail of a teacher is known at temperature 1 only"
    known_TK = (ids_TK >= 0) & (ids_TK < vocab_size)
    teacher_TK = torch.where(known_TK, logprobs_TK.float() / temperature, _NEVER)
    student_TK = vocab_parallel_logprobs_at(
        student_TV,
        torch.where(known_TK, ids_TK, 0),
        temperature=temperature,
        vocab_size=vocab_size,
        group=group,
    )
    student_TK = torch.where(known_TK, student_TK, _NEVER)
    if tail:
        teacher_TK, student_TK = _with_tail(teacher_TK), _with_tail(student_TK)
    else:
        teacher_TK, student_TK = teacher_TK.log_softmax(dim=1), student_TK.log_softmax(dim=1)
    return torch.where(known_TK.any(dim=1), _divergence(student_TK, teacher_TK, beta), 0.0)


def _with_tail(logprobs_TK: torch.Tensor) -> torch.Tensor:
    """With the probability of all other tokens as one more, of no less than what float32 can tell from zero."""
    total_T = torch.logsumexp(logprobs_TK, dim=1).clamp(max=-torch.finfo(torch.float32).eps)
    return torch.cat([logprobs_TK, torch.log(-torch.expm1(total_T))[:, None]], dim=1)


def _divergence(student_TK: torch.Tensor, teacher_TK: torch.Tensor, beta: float) -> torch.Tensor:
    if beta == 0:
        return (teacher_TK.exp() * (teacher_TK - student_TK)).sum(dim=1)
    if beta == 1:
        return (student_TK.exp() * (student_TK - teacher_TK)).sum(dim=1)
    mixture_TK = torch.logaddexp(teacher_TK + math.log(beta), student_TK + math.log1p(-beta))
    from_teacher_T = (teacher_TK.exp() * (teacher_TK - mixture_TK)).sum(dim=1)
    from_student_T = (student_TK.exp() * (student_TK - mixture_TK)).sum(dim=1)
    return beta * from_teacher_T + (1 - beta) * from_student_T


def vocab_parallel_topk(
    logits_TV: torch.Tensor, k: int, *, vocab_size: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [T, K] of the k likeliest tokens and their float32 log-probabilities, the same on all ranks.

    K is k, or `vocab_size` where that is less. No gradient.
    """
    start, kept = share_of(logits_TV, vocab_size, group)
    count = min(k, logits_TV.shape[1])
    padding = logits_TV.shape[1] - kept
    shown_TV = torch.nn.functional.pad(logits_TV[:, :kept], (0, padding), value=-math.inf)
    values_TK, ids_TK = shown_TV.topk(count, dim=1)
    ids_TK += start
    if group is not None:
        values_TK, ids_TK = (_gathered(each, group) for each in (values_TK, ids_TK))
    values_TK, places_TK = values_TK.float().topk(min(k, vocab_size), dim=1)
    total_T = softmax_total(logits_TV, 1.0, kept, group)
    return ids_TK.gather(1, places_TK), values_TK - total_T[:, None]


def _gathered(mine: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def vocab_parallel_logprobs_at(
    logits_TV: torch.Tensor,
    ids_TK: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Float32 log-probabilities [T, K] of several tokens at each position under softmax(logits / temperature).

    Otherwise as megatron_logprobs.vocab_parallel_logprobs.
    """
    start, kept = share_of(logits_TV, vocab_size, group)
    return _LogprobsAt.apply(logits_TV, ids_TK - start, temperature, kept, group)  # pyright: ignore[reportReturnType]


class _LogprobsAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: torch.Tensor,
        local_TK: torch.Tensor,
        temperature: float,
        kept: int,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        mine_TK = (local_TK >= 0) & (local_TK < kept)
        ids_TK = torch.where(mine_TK, local_TK, 0)
        total_T = softmax_total(logits_TV, temperature, kept, group)
        picked_TK = (logits_TV.gather(1, ids_TK).float() / temperature).masked_fill_(~mine_TK, 0.0)
        if group is not None:
            dist.all_reduce(picked_TK, group=group)
        ctx.save_for_backward(logits_TV, ids_TK, mine_TK, total_T)
        ctx.temperature, ctx.kept = temperature, kept
        return picked_TK - total_T[:, None]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        logits_TV, ids_TK, mine_TK, total_T = ctx.saved_tensors
        scale_TK = grad_outputs[0] / ctx.temperature
        grad_TV = torch.zeros_like(logits_TV)
        for rows in row_chunks(logits_TV):
            scaled = logits_TV[rows].float() / ctx.temperature
            grad = (scaled - total_T[rows, None]).exp_().mul_(-scale_TK[rows].sum(dim=1, keepdim=True))
            grad[:, ctx.kept :] = 0.0
            grad.scatter_add_(1, ids_TK[rows], torch.where(mine_TK[rows], scale_TK[rows], 0.0))
            grad_TV[rows] = grad
        return grad_TV, None, None, None, None
