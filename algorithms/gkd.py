"""Generalized knowledge distillation: completions, own or given -> train step towards the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from algorithms.clock import Clock
from algorithms.completions import place_of, sample_of, seeded, teacher_of
from algorithms.data import (
    Batch,
    FloatRow,
    Group,
    Prompt,
    SamplingSettings,
    Scored,
    TrainSample,
    float_row,
)
from algorithms.packing import pack, with_top_tokens
from algorithms.progress import Forgetful, Keeper, Progress
from algorithms.prompts import PromptStream
from algorithms.roles import Recorder, Sampler, TopTeacher, Trainer, WeightSync
from configs.errors import BasculeError
from configs.schema import RunConfig


class Distiller(Trainer, Protocol):
    """The student, and its teacher."""

    def divergences(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """Divergence of the student from the teacher at each token, by rank and micro-batch, each of length T."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """What completes prompts as the student would: engines, and the way of its weights to them."""

    sampler: Sampler
    weights: WeightSync


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """Everything the loop talks to. `student` is None in a run without on-policy steps, `teacher` in one whose
    trainer has the teacher; `writer`, with gkd.seq_kd, completes prompts as the teacher would."""

    trainer: Distiller
    student: Student | None
    teacher: TopTeacher | None = None
    writer: Sampler | None = None
    recorder: Recorder


def train(
    config: RunConfig,
    roles: Roles,
    prompts: PromptStream[Prompt] | None,
    samples: PromptStream[TrainSample] | None,
    held_out: Sequence[TrainSample],
    keeper: Keeper | None = None,
) -> None:
    """Run `max_steps` optimizer steps of `gkd.batch_size` samples; evaluate before, after, and every `eval_steps`.

    A step is on-policy with probability `gkd.lmbda`: the student completes `prompts`, under weights that engines
    are sent just before. Other steps take `samples`, or with `gkd.seq_kd` what the teacher makes of `prompts`. A
    step that is left with nothing is recorded and trains nothing. Raises BasculeError after `gkd.max_empty_steps`
    in a row, among those that sample. `keeper` tells after which of the steps to begin.
    """
    keeper = keeper or Forgetful()
    empty = keeper.start.empty
    if not keeper.start.step:
        _evaluate(config, roles, held_out, 0)
    for step in range(keeper.start.step + 1, config.max_steps + 1):
        clock = Clock(roles.recorder.phase)
        metrics: dict[str, float] = {"on_policy": float(is_on_policy(config, step))}
        if is_on_policy(config, step):
            assert roles.student is not None, "a run with on-policy steps has engines"
            assert prompts is not None, "and prompts"
            with clock("sync"):
                metrics |= roles.student.weights.sync(step - 1)
            with clock("generate"):
                groups = _complete(roles.student.sampler, prompts, config, step)
            taken = [sample for group in groups for sample in to_samples(group, config)]
        elif roles.writer is not None:
            assert prompts is not None, "a teacher that writes has prompts"
            with clock("generate"):
                groups = _complete(roles.writer, prompts, config, step)
            taken = [_given(sample) for group in groups for sample in to_samples(group, config)]
        else:
            assert samples is not None, "a run with other steps has samples"
            groups = None
            taken = [_given(sample) for sample in samples.take(config.gkd.batch_size)]
        if groups is not None:
            roles.recorder.rollouts(step, map(_unscored, groups))
            empty = 0 if taken else empty + 1
            _check_empty(empty, step, groups, config)
        if taken:
            with clock("teach"):
                batch = _batch(config, roles, taken)
            with clock("train"):
                metrics |= roles.trainer.step(batch).numbers
        metrics |= clock.metrics()
        metrics |= {
            "samples": float(len(taken)),
            "tokens": float(sum(each.num_loss_tokens for each in taken)),
        }
        metrics["tokens_per_second"] = metrics["tokens"] / metrics["time/step"]
        roles.recorder.step(step, metrics)
        if config.saves_at(step):
            roles.trainer.save(step)
        if config.evaluates_at(step):
            _evaluate(config, roles, held_out, step)
        keeper.keep(Progress(step=step, version=step, empty=empty))


def _complete(sampler: Sampler, prompts: PromptStream[Prompt], config: RunConfig, step: int) -> list[Group]:
    taken = prompts.take(config.gkd.batch_size)
    requests = seeded(taken, _sampling(config), seed=config.seed, step=step)
    return sorted(sampler.generate(requests), key=place_of)


def _evaluate(config: RunConfig, roles: Roles, held_out: Sequence[TrainSample], step: int) -> None:
    with roles.recorder.phase("evaluate"):
        metrics = evaluate(config, roles, held_out)
    roles.recorder.evaluation(step, (), metrics)
    if metrics:
        roles.trainer.rate(step, -metrics["eval/divergence"])


def _batch(config: RunConfig, roles: Roles, samples: Sequence[TrainSample]) -> Batch:
    batch = pack(samples, config.trainer)
    return batch if roles.teacher is None else with_top_tokens(batch, roles.teacher.top_tokens(samples))


def evaluate(config: RunConfig, roles: Roles, held_out: Sequence[TrainSample]) -> dict[str, float]:
    """`eval/divergence`: the mean over all tokens of the held-out completions; nothing without any."""
    total, count, size = 0.0, 0, config.gkd.batch_size
    for first in range(0, len(held_out), size):
        batch = _batch(config, roles, held_out[first : first + size])
        for micros, rows in zip(batch.ranks, roles.trainer.divergences(batch), strict=True):
            for micro, row in zip(micros, rows, strict=True):
                total += float(np.sum(row * micro.loss_mask_T, dtype=np.float64))
        count += batch.num_loss_tokens
    return {"eval/divergence": total / count} if count else {}


def _check_empty(empty: int, step: int, groups: Sequence[Group], config: RunConfig) -> None:
    if empty >= config.gkd.max_empty_steps:
        finishes = [rollout.finish for group in groups for rollout in group.rollouts]
        raise BasculeError(
            f"{empty} sampled steps in a row, the last one step {step}, had nothing to train on: of its "
            f"{len(finishes)} completions {finishes.count('abort')} were aborted, and the others have no token; "
            "look at rollouts.jsonl, and at what became of the engines"
        )


def is_on_policy(config: RunConfig, step: int) -> bool:
    """Whether this step trains on completions of the student: drawn from the seed for every step by itself."""
    drawn = np.random.default_rng((config.seed, step)).random()
    return bool(drawn < config.gkd.lmbda)


def to_samples(group: Group, config: RunConfig) -> list[TrainSample]:
    """Completions of a prompt as sequences to train on, without those that were aborted or have no token."""
    teacher = teacher_of(group.prompt.columns, config)
    return [
        sample_of(group.prompt, rollout, teacher)
        for rollout in group.rollouts
        if rollout.finish != "abort" and rollout.loss_mask.any()
    ]


def _given(sample: TrainSample) -> TrainSample:
    """With an advantage of 1, by which the loss knows where cross-entropy is added (losses.gkd_loss)."""
    return replace(sample, advantages=float_row(np.ones(sample.tokens.size)))


def _sampling(config: RunConfig) -> SamplingSettings:
    gkd = config.gkd
    return SamplingSettings(
        n=1,
        max_tokens=gkd.max_completion_length,
        temperature=gkd.temperature,
        top_p=gkd.top_p,
        top_k=gkd.top_k,
        stop=gkd.stop,
    )


def _unscored(group: Group) -> Scored:
    return Scored(group=group, rewards=float_row([np.nan] * len(group.rollouts)), parts={})
