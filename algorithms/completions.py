"""What every loop does with completions: ask for them, put them in order, make samples of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from algorithms.data import Group, Prompt, Rollout, SamplingSettings, TrainSample, float_row, int_row
from algorithms.vision import followed
from configs.schema import RunConfig


def seeded(
    prompts: Sequence[Prompt], sampling: SamplingSettings, *, seed: int, step: int, first: int = 0
) -> Iterator[tuple[Prompt, SamplingSettings]]:
    """Requests of a step, each with a seed of its own, so that a run can be repeated.

    `first` is how many prompts of the step have been drawn before.
    """
    for position, prompt in enumerate(prompts, first):
        drawn = np.random.SeedSequence((seed, step, position)).generate_state(1)[0]
        yield prompt, replace(sampling, seed=int(drawn))


def place_of(group: Group) -> tuple[str, bytes]:
    """A key to sort by: groups finish in any order; the batch, and so the run, must not depend on it."""
    return group.prompt.id, group.rollouts[0].tokens.tobytes()


def teacher_of(columns: Mapping[str, Any], config: RunConfig) -> str:
    """Which teacher a row is for, by its column; "" where there is one."""
    column = config.teacher.teacher_column
    return "" if column is None else str(columns[column])


def sample_of(prompt: Prompt, rollout: Rollout, teacher: str = "") -> TrainSample:
    """Prompt and completion as a sequence to train on, with advantages of zero."""
    before = np.zeros(prompt.tokens.size, np.float32)
    tokens = np.concatenate([prompt.tokens, rollout.tokens])
    return TrainSample(
        tokens=int_row(tokens),
        loss_mask=int_row(np.concatenate([before, rollout.loss_mask])),
        advantages=float_row(np.zeros(tokens.size)),
        logprobs=float_row(np.concatenate([before, rollout.logprobs])),
        version=rollout.versions[0],
        teacher=teacher,
        vision=followed(prompt.vision, tokens.size),
    )
