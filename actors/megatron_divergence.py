"""Divergence of a student from a teacher, with vocabularies that are split over tensor-parallel ranks.

The generalized Jensen-Shannon divergence of Agarwal et al. 2024 (GKD), with T the teacher, S the student and
M = beta T + (1 - beta) S: beta KL(T || M) + (1 - beta) KL(S || M) between 0 and 1, KL(T || S) at beta 0 and
KL(S || T) at beta 1. The two ends are not limits of what is between them, which goes to zero there.
"""

import math
from typing import Any

import torch
import torch.distributed as dist

from actors.megatron_vocabulary import row_chunks, share_of, softmax_total


def vocab_parallel_divergence(
    student_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    *,
    beta: float,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Float32 divergence [T] between the softmax of both logits over `temperature`, in nats.

    Both are this rank's equal share of a padded vocabulary, in rank order, of the same width (`aligned` makes
    it so); entries from `vocab_size` on have probability zero. Arithmetic is float32, a few tokens at a time:
    nothing of the size of the logits is kept but the logits themselves. Only the student gets a gradient; that
    of the result must be the same on all ranks of `group` (None: the vocabulary is not split).
    """
    _, kept = share_of(student_TV, vocab_size, group)
    return _VocabParallelDivergence.apply(student_TV, teacher_TV, beta, temperature, kept, group)  # pyright: ignore[reportReturnType]


class _VocabParallelDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_TV: torch.Tensor,
        teacher_TV: torch.Tensor,
        beta: float,
        temperature: float,
        kept: int,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        totals_T = [softmax_total(logits, temperature, kept, group) for logits in (student_TV, teacher_TV)]
        ctx.beta, ctx.temperature, ctx.kept = beta, temperature, kept
        sums: list[torch.Tensor] = []
        for rows in row_chunks(student_TV):
            student = _log_softmax(student_TV[rows, :kept], totals_T[0][rows], temperature)
            teacher = _log_softmax(teacher_TV[rows, :kept], totals_T[1][rows], temperature)
            sums.append(torch.stack(_sums(student, teacher, beta)))
        both = torch.cat(sums, dim=1)
        if group is not None:
            dist.all_reduce(both, group=group)
        divergence_T, student_part_T = both.unbind()
        ctx.save_for_backward(student_TV, teacher_TV, *totals_T, student_part_T)
        return divergence_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        student_TV, teacher_TV, student_total_T, teacher_total_T, student_part_T = ctx.saved_tensors
        scale_T = grad_outputs[0] / ctx.temperature
        grad_TV = torch.zeros_like(student_TV)
        for rows in row_chunks(student_TV):
            student = _log_softmax(student_TV[rows, : ctx.kept], student_total_T[rows], ctx.temperature)
            teacher = _log_softmax(teacher_TV[rows, : ctx.kept], teacher_total_T[rows], ctx.temperature)
            if ctx.beta == 0:
                grad = student.exp_() - teacher.exp_()
            else:
                # The derivative by each probability of the student, less its mean under the student.
                slope = _slope(student, teacher, ctx.beta) - student_part_T[rows, None]
                grad = student.exp_().mul_(slope)
            grad_TV[rows, : ctx.kept] = grad.mul_(scale_T[rows, None])
        return grad_TV, None, None, None, None, None


def _log_softmax(logits: torch.Tensor, total_T: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits.float() / temperature).sub_(total_T[:, None])


def _log_mixture(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))


def _slope(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Derivative of the divergence by the student's probabilities, up to a constant."""
    if beta == 1:
        return student - teacher
    return (student - _log_mixture(student, teacher, beta)).mul_(1 - beta)


def _sums(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Over these entries of the vocabulary: the divergence, and the mean under the student of its slope."""
    if beta == 0:
        divergence = (teacher.exp() * (teacher - student)).sum(dim=1)
        return divergence, torch.zeros_like(divergence)
    student_part = (student.exp() * _slope(student, teacher, beta)).sum(dim=1)
    if beta == 1:
        return student_part, student_part
    from_teacher = (teacher.exp() * (teacher - _log_mixture(student, teacher, beta))).sum(dim=1)
    return beta * from_teacher + student_part, student_part


def aligned(
    teacher_TV: torch.Tensor, width: int, vocab_size: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """The teacher's logits as shares of `width`: cut where the student's are.

    Vocabularies padded to other sizes are split at other places. `vocab_size` is the smaller one; what a
    share has beyond it is zeros. Holds the whole vocabulary for a moment, when there is anything to do.
    """
    if teacher_TV.shape[1] == width:
        return teacher_TV
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    parts = [teacher_TV.contiguous()]
    if group is not None:
        parts = [torch.empty_like(parts[0]) for _ in range(ranks)]
        dist.all_gather(parts, teacher_TV.contiguous(), group=group)
    mine = torch.cat(parts, dim=1)[:, rank * width : min((rank + 1) * width, vocab_size)]
    return torch.nn.functional.pad(mine, (0, width - mine.shape[1]))
