"""Generalized knowledge distillation: completions, the student's own or given -> train step towards the teacher."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from algorithms.clock import Clock
from algorithms.data import Group, Prompt, SamplingSettings, Scored, TrainSample, float_row, int_row
from algorithms.packing import pack
from algorithms.prompts import PromptStream
from algorithms.roles import Recorder, Sampler, Trainer, WeightSync
from configs.schema import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """What completes prompts as the trained model would: engines, and the way of its weights to them."""

    sampler: Sampler
    weights: WeightSync


def train(
    config: RunConfig,
    trainer: Trainer,
    student: Student | None,
    prompts: PromptStream[Prompt],
    samples: PromptStream[TrainSample] | None,
    recorder: Recorder,
) -> None:
    """Run `max_steps` optimizer steps of `gkd.batch_size` samples each.

    A step is on-policy with probability `gkd.lmbda`, which needs a `student`; others take `samples`. The trainer
    knows the teacher. Engines are sent weights just before they sample with them.
    """
    for step in range(1, config.max_steps + 1):
        clock = Clock()
        synced: Mapping[str, float] = {}
        on_policy = is_on_policy(config, step)
        if on_policy:
            assert student is not None, "a run with on-policy steps has engines"
            with clock("sync"):
                synced = student.weights.sync(step - 1)
            with clock("generate"):
                requests = _requests(config, prompts.take(config.gkd.batch_size), step)
                groups = sorted(student.sampler.generate(requests), key=_place)
            recorder.rollouts(step, map(_unscored, groups))
            taken = [sample for group in groups for sample in to_samples(group)]
        else:
            assert samples is not None, "a run with other steps has samples"
            taken = [_of_dataset(sample) for sample in samples.take(config.gkd.batch_size)]
        batch = pack(taken, config.trainer)
        with clock("train"):
            result = trainer.step(batch)
        times = clock.metrics()
        recorder.step(
            step,
            {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
                "on_policy": float(on_policy),
                "tokens_per_second": batch.num_loss_tokens / times["time/step"],
                **result.metrics,
                **synced,
                **times,
            },
        )
        if config.saves_at(step):
            trainer.save(step)


def is_on_policy(config: RunConfig, step: int) -> bool:
    """Whether this step trains on completions of the student: drawn from the seed for every step by itself."""
    drawn = np.random.default_rng((config.seed, step)).random()
    return bool(drawn < config.gkd.lmbda)


def to_samples(group: Group) -> list[TrainSample]:
    """Completions of a prompt as sequences to train on, without those that were aborted."""
    prompt = group.prompt.tokens
    before = np.zeros(prompt.size, np.float32)
    return [
        TrainSample(
            tokens=int_row(np.concatenate([prompt, rollout.tokens])),
            loss_mask=int_row(np.concatenate([before, rollout.loss_mask])),
            advantages=float_row(np.zeros(prompt.size + rollout.tokens.size)),
            logprobs=float_row(np.concatenate([before, rollout.logprobs])),
            version=rollout.versions[0],
        )
        for rollout in group.rollouts
        if rollout.finish != "abort"
    ]


def _of_dataset(sample: TrainSample) -> TrainSample:
    """With an advantage of 1, by which the loss knows where cross-entropy is added (losses.gkd_loss)."""
    return replace(sample, advantages=float_row(np.ones(sample.tokens.size)))


def _requests(
    config: RunConfig, prompts: Sequence[Prompt], step: int
) -> Iterator[tuple[Prompt, SamplingSettings]]:
    gkd = config.gkd
    for position, prompt in enumerate(prompts):
        seed = np.random.SeedSequence((config.seed, step, position)).generate_state(1)[0]
        yield (
            prompt,
            SamplingSettings(
                n=1,
                max_tokens=gkd.max_completion_length,
                temperature=gkd.temperature,
                top_p=gkd.top_p,
                top_k=gkd.top_k,
                stop=gkd.stop,
                seed=int(seed),
            ),
        )


def _place(group: Group) -> tuple[str, bytes]:
    """Groups finish in any order; the batch, and so the run, must not depend on it."""
    return group.prompt.id, group.rollouts[0].tokens.tobytes()


def _unscored(group: Group) -> Scored:
    return Scored(group=group, rewards=float_row([np.nan] * len(group.rollouts)), parts={})
