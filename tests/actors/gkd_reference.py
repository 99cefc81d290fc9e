"""What divergences are compared with: torch.log_softmax, autograd and the formula, on whole logits in float64."""

import torch

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def kl(left_TV: torch.Tensor, right_TV: torch.Tensor) -> torch.Tensor:
    """KL(left || right) [T] of two rows of log-probabilities; entries of the left that are -inf count nothing."""
    terms = left_TV.exp() * (left_TV - right_TV)
    return torch.where(left_TV > float("-inf"), terms, 0.0).sum(dim=-1)


def divergence(student_TV: torch.Tensor, teacher_TV: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence [T] of log-probabilities, by the definition."""
    if beta == 0:
        return kl(teacher_TV, student_TV)
    if beta == 1:
        return kl(student_TV, teacher_TV)
    mixture = (beta * teacher_TV.exp() + (1 - beta) * student_TV.exp()).log()
    return beta * kl(teacher_TV, mixture) + (1 - beta) * kl(student_TV, mixture)


def of_logits(
    student_TV: torch.Tensor, teacher_TV: torch.Tensor, beta: float, temperature: float
) -> torch.Tensor:
    """The same of logits."""
    student, teacher = (
        torch.log_softmax(logits.double() / temperature, -1) for logits in (student_TV, teacher_TV)
    )
    return divergence(student, teacher, beta)


def of_topk(
    student_TV: torch.Tensor,
    teacher_TV: torch.Tensor,
    ids_TK: torch.Tensor,
    beta: float,
    temperature: float,
    *,
    tail: bool,
) -> torch.Tensor:
    """The same among the tokens `ids_TK` alone, or with all others as one more outcome."""
    rows: list[torch.Tensor] = []
    for logits in (student_TV, teacher_TV):
        probabilities_TV = torch.softmax(logits.double() / temperature, -1)
        chosen_TK = probabilities_TV.gather(1, ids_TK)
        rest_T = 1 - chosen_TK.sum(dim=1, keepdim=True)
        chosen_TK = torch.cat([chosen_TK, rest_T], 1) if tail else chosen_TK / (1 - rest_T)
        rows.append(chosen_TK.log())
    return divergence(rows[0], rows[1], beta)
