"""On-policy distillation: what a teacher thinks of completions of the policy, as advantages of tokens."""

from collections.abc import Sequence

import numpy as np

from algorithms.data import Batch, FloatRow, TrainSample, float_row
from algorithms.packing import unpack
from algorithms.roles import TokenTeacher, Trainer


def teacher_logprobs(
    samples: Sequence[TrainSample], batch: Batch, trainer: Trainer, teacher: TokenTeacher | None
) -> list[FloatRow]:
    """Of each sample the teacher's log-probability of each token; `batch` holds the samples, packed.

    Without a `teacher` that is asked elsewhere the trainer has it.
    """
    if teacher is not None:
        return teacher.token_logprobs(samples)
    return unpack(batch, trainer.teacher_logprobs(batch))


def distillation_advantages(
    sample: TrainSample, policy: FloatRow, teacher: FloatRow, coefficient: float
) -> FloatRow:
    """coefficient x log(teacher / policy) at each loss token, both as they were before the first optimizer step.

    Its mean under the policy is minus the reverse KL at that token, of which it is the estimate k1 of one sample;
    what a token does to those after it does not count. Source: Lu and Thinking Machines 2025 (On-Policy
    Distillation), Gu et al. 2024 (MiniLLM).
    """
    return float_row(coefficient * sample.loss_mask * (teacher - policy))


def reverse_kl(
    samples: Sequence[TrainSample], policy: Sequence[FloatRow], teacher: Sequence[FloatRow]
) -> float:
    """Mean over the loss tokens of log(policy / teacher), in nats; NaN without any."""
    rows = [
        (ours - theirs)[sample.loss_mask > 0]
        for sample, ours, theirs in zip(samples, policy, teacher, strict=True)
    ]
    every = np.concatenate([np.zeros(0), *rows])
    return float(every.mean()) if every.size else float("nan")
