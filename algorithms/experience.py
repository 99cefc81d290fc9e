"""From scored groups to samples with all that the loss asks for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from algorithms.advantages import advantages_of
from algorithms.completions import sample_of, teacher_of
from algorithms.data import Batch, FloatRow, Scored, TrainSample, float_row, int_row
from algorithms.distillation import distillation_advantages, reverse_kl, teacher_logprobs
from algorithms.packing import Scaling, pack, unpack
from algorithms.roles import TokenTeacher, Trainer
from configs.grpo import GRPOConfig
from configs.schema import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Which completion a sample is: number `index` of the prompt's group, beginning at token `start`."""

    prompt_id: str
    index: int
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience:
    """What one generation step trains on. `origins` has one entry per sample."""

    samples: tuple[TrainSample, ...]
    origins: tuple[Origin, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """Samples with what the loss asks for, and what else was asked about each of their tokens."""

    samples: Sequence[TrainSample]
    entropies: Sequence[FloatRow] | None = None
    teacher: Sequence[FloatRow] | None = None


def gather(
    groups: Sequence[Scored], config: RunConfig, trainer: Trainer, teacher: TokenTeacher | None = None
) -> Experience:
    """Samples of the completions that have a reward or a teacher, with advantages, in the order of the groups.

    Trainer and teacher are asked for what must be known before the first optimizer step on them: log-probabilities
    under the policy when weights will change between steps, under the reference when there is a KL
    term, under the teacher, entropies when tokens are chosen by them.
    """
    settings = config.grpo
    kept = [_kept(each, settings) for each in groups]
    samples = [
        sample_of(each.group.prompt, rollout, teacher_of(each.group.prompt.columns, config))
        for each, used in zip(groups, kept, strict=True)
        for rollout, is_used in zip(each.group.rollouts, used, strict=True)
        if is_used
    ]
    origins = tuple(
        Origin(prompt_id=each.group.prompt.id, index=int(index), start=each.group.prompt.tokens.size)
        for each, used in zip(groups, kept, strict=True)
        for index in np.flatnonzero(used)
    )
    asked = _ask(samples, config, trainer, teacher) if samples else _Asked(samples=())
    samples = asked.samples
    rewards = [each.rewards for each in groups]
    metrics: dict[str, float] = {}
    if settings.kl_in_reward:
        rewards = _with_kl(rewards, kept, [settings.beta * _k1(sample) for sample in samples])
    found = advantages_of(groups, rewards, settings)
    chosen = [value for row, used in zip(found, kept, strict=True) for value in row[used]]
    samples = [
        replace(sample, advantages=float_row(sample.loss_mask * (value + credit)))
        for sample, value, credit in zip(samples, chosen, _credits(groups, kept, samples), strict=True)
    ]
    if asked.teacher is not None:
        samples, metrics["teacher_kl"] = _taught(samples, asked.teacher, settings)
    if asked.entropies is not None:
        samples, metrics["entropy_threshold"] = _most_uncertain(
            samples, asked.entropies, settings.top_entropy_quantile
        )
    return Experience(samples=tuple(samples), origins=origins, metrics=metrics)


def optimizer_batches(samples: Sequence[TrainSample], config: RunConfig) -> list[Batch]:
    """One batch for each of `steps_per_generation` optimizer steps; a part without samples has none."""
    steps = config.grpo.steps_per_generation
    parts = [part for part in (samples[first::steps] for first in range(steps)) if part]
    tokens = sum(sample.num_loss_tokens for sample in samples)
    return [pack(part, config.trainer, scaling(part, tokens / len(parts), config.grpo)) for part in parts]


def scaling(samples: Sequence[TrainSample], tokens_per_step: float, settings: GRPOConfig) -> Scaling:
    """How the terms of an optimizer step's tokens become its loss.

    `tokens_per_step` are the loss tokens of the generation step over its optimizer steps.
    """
    match settings.loss_type:
        case "dapo" | "cispo":
            return Scaling(per="token", denominator=tokens_per_step)
        case "bnpo":
            return Scaling(per="token", denominator=sum(sample.num_loss_tokens for sample in samples))
        case "dr_grpo":
            return Scaling(per="token", denominator=len(samples) * settings.max_completion_length)
        case "grpo" | "sapo":
            return Scaling(per="sequence", denominator=len(samples))


def untrained(groups: Sequence[Scored], settings: GRPOConfig) -> str:
    """Why a step had nothing to train on: how many of its completions are left out for which reason."""
    reasons = [reason or _EQUAL for each in groups for reason in _left_out(each, settings)]
    counts = [f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)]
    return f"Of its {len(reasons)} completions {', '.join(counts)}"


_EQUAL = (
    "are in groups whose rewards are all equal (the task is too hard or too easy for the model, or the reward is "
    "constant)"
)


def _kept(scored: Scored, settings: GRPOConfig) -> NDArray[np.bool_]:
    """Which completions are trained on: those with a reward or a teacher and a token, unless cut where that is
    masked."""
    return np.array([reason is None for reason in _left_out(scored, settings)])


def _left_out(scored: Scored, settings: GRPOConfig) -> Iterator[str | None]:
    """Of each completion why it is not trained on, None if it is."""
    for rollout, reward in zip(scored.group.rollouts, scored.rewards, strict=True):
        if rollout.finish == "abort":
            yield "were aborted"
        elif np.isnan(reward) and settings.teacher_kl_coef == 0:
            yield "have no reward of any function"
        elif not rollout.loss_mask.any():
            yield "have no token"
        elif rollout.finish == "length" and settings.mask_truncated_completions:
            yield "were cut at max_completion_length, and mask_truncated_completions leaves those out"
        else:
            yield None


def _credits(
    groups: Sequence[Scored], kept: Sequence[NDArray[np.bool_]], samples: Sequence[TrainSample]
) -> list[FloatRow]:
    """What spans add to the advantage of each token of each sample: nothing where there are none."""
    own: list[FloatRow | None] = []
    for each, used in zip(groups, kept, strict=True):
        rows_of_group = each.credits or (None,) * used.size
        own += [row for row, is_used in zip(rows_of_group, used, strict=True) if is_used]
    rows: list[FloatRow] = []
    for credit, sample in zip(own, samples, strict=True):
        row = np.zeros(sample.tokens.size, np.float32)
        if credit is not None:
            row[sample.tokens.size - credit.size :] = credit
        rows.append(row)
    return rows


def _ask(
    samples: Sequence[TrainSample], config: RunConfig, trainer: Trainer, teacher: TokenTeacher | None
) -> _Asked:
    settings = config.grpo
    batch = pack(samples, config.trainer)
    asked = list(samples)
    if settings.beta > 0:
        rows = unpack(batch, trainer.reference_logprobs(batch))
        asked = [replace(sample, ref_logprobs=row) for sample, row in zip(asked, rows, strict=True)]
    if settings.optimizer_steps > 1 or settings.kl_in_reward or config.has_teacher:
        rows = unpack(batch, trainer.logprobs(batch))
        asked = [replace(sample, old_logprobs=row) for sample, row in zip(asked, rows, strict=True)]
    return _Asked(
        samples=asked,
        entropies=unpack(batch, trainer.entropies(batch)) if settings.top_entropy_quantile < 1 else None,
        teacher=teacher_logprobs(samples, batch, trainer, teacher) if config.has_teacher else None,
    )


def _taught(
    samples: Sequence[TrainSample], teacher: Sequence[FloatRow], settings: GRPOConfig
) -> tuple[list[TrainSample], float]:
    """The samples with the teacher's word added to their advantages, and the reverse KL to it."""
    policy = [_known(sample.old_logprobs) for sample in samples]
    added = [
        distillation_advantages(sample, ours, theirs, settings.teacher_kl_coef)
        for sample, ours, theirs in zip(samples, policy, teacher, strict=True)
    ]
    taught = [
        replace(sample, advantages=float_row(sample.advantages + row))
        for sample, row in zip(samples, added, strict=True)
    ]
    return taught, reverse_kl(samples, policy, teacher)


def _known(row: FloatRow | None) -> FloatRow:
    assert row is not None, "asked for"
    return row


def _with_kl(
    rewards: Sequence[FloatRow], kept: Sequence[NDArray[np.bool_]], penalties: Sequence[float]
) -> list[FloatRow]:
    """Rewards less the penalties, one for each completion that is kept, in their order."""
    left = iter(penalties)
    return [
        float_row([value - next(left) if used else value for value, used in zip(row, used_K, strict=True)])
        for row, used_K in zip(rewards, kept, strict=True)
    ]


def _k1(sample: TrainSample) -> float:
    """log(policy / reference) of the whole completion, before the first optimizer step."""
    difference = _known(sample.old_logprobs).astype(np.float64) - _known(sample.ref_logprobs)
    return float((difference * sample.loss_mask).sum())


def _most_uncertain(
    samples: Sequence[TrainSample], entropies: Sequence[FloatRow], share: float
) -> tuple[list[TrainSample], float]:
    """The samples with a policy mask: loss tokens whose entropy is in the top `share` of all of them.

    Source: Wang et al. 2025 (beyond the 80/20 rule). The threshold is over all samples, not a micro-batch.
    """
    pairs = list(zip(samples, entropies, strict=True))
    every = np.concatenate([row[sample.loss_mask > 0] for sample, row in pairs])
    threshold = float(np.quantile(every, 1 - share))
    masks = [int_row((row >= threshold) & (sample.loss_mask > 0)) for sample, row in pairs]
    return [replace(sample, policy_mask=mask) for sample, mask in zip(samples, masks, strict=True)], threshold
