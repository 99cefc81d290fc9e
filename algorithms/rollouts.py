"""Where a generation step's scored groups come from."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from algorithms.advantages import has_signal, values_by_function
from algorithms.completions import place_of, seeded
from algorithms.data import Group, Prompt, SamplingSettings, Scored, float_row
from algorithms.progress import Begun
from algorithms.prompts import PromptStream
from algorithms.roles import Judge, Sampler
from configs.grpo import GRPOConfig
from configs.schema import RunConfig

SOFT_OVERLONG = "soft_overlong"


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """What was sampled in a step, and the groups of it to train on, in an order that does not depend on time."""

    scored: tuple[Scored, ...]
    kept: tuple[Scored, ...]


class Rollouts:
    """Samples and scores the prompts of one generation step after the other, `max_lag` steps ahead."""

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        judge: Judge,
        prompts: PromptStream[Prompt],
        done: int = 0,
        begun: Sequence[Begun] = (),
    ) -> None:
        """The first step is the one after `done`; `begun` is what was sampled of the next ones already."""
        self._config = config
        self._sampler = sampler
        self._judge = judge
        self._prompts = prompts
        # Of the steps that engines are working on, in order; the last of them is step `_last`.
        self._begun: deque[Iterator[Group]] = deque(iter(each.groups) for each in begun)
        self._last = done + len(begun)

    def settle(self) -> Sequence[Begun]:
        """Wait for all that engines were given ahead (algorithms.progress.Ahead)."""
        first = self._last - len(self._begun) + 1
        groups = [tuple(each) for each in self._begun]
        self._begun = deque(map(iter, groups))
        return [Begun(step=first + number, groups=each) for number, each in enumerate(groups)]

    def generate(self, step: int) -> Generated:
        """The next `prompts_per_step` prompts, sampled and scored.

        The steps after it, up to `max_lag`, are begun before that, so that engines have work while the trainer
        trains on this one: what step s + max_lag is trained with began under the weights of step s, which are
        `max_lag` versions older. With `dynamic_sample` further prompts take the place of groups without a
        signal, at most `max_resample_times` times; what is left over in the end is the last of them.
        """
        settings = self._config.grpo
        while self._last < min(step + settings.max_lag, self._config.max_steps):
            self._last += 1
            self._begun.append(self._begin(self._last, settings.prompts_per_step, 0))
        assert self._last - len(self._begun) == step - 1, "steps come in order"
        groups = self._begun.popleft()
        scored: list[Scored] = []
        kept: list[Scored] = []
        drawn = settings.prompts_per_step
        left = settings.max_resample_times if settings.dynamic_sample else 0
        while True:
            found = [with_overlong(without_aborted(each), settings) for each in self._judge.score(groups)]
            found.sort(key=lambda each: place_of(each.group))
            scored += found
            kept += [each for each in found if is_trained_on(each, settings)]
            missing = settings.prompts_per_step - len(kept)
            if not missing or not left:
                return Generated(scored=tuple(scored), kept=tuple(kept))
            left -= 1
            groups = self._begin(step, missing, drawn)
            drawn += missing

    def _begin(self, step: int, num_prompts: int, drawn: int) -> Iterator[Group]:
        prompts, sampling = self._prompts.take(num_prompts), _sampling(self._config.grpo)
        requests = seeded(prompts, sampling, seed=self._config.seed, step=step, first=drawn)
        return self._sampler.generate(requests)


def staleness(scored: Sequence[Scored], version: int) -> dict[str, float]:
    """How many weight versions older than `version` the oldest part of completions is: mean and largest."""
    ages = [version - rollout.versions[0] for each in scored for rollout in each.group.rollouts]
    return {"sampling/staleness_mean": float(np.mean(ages)), "sampling/staleness_max": float(max(ages))}


def without_aborted(scored: Scored) -> Scored:
    """The group without the rewards of aborted completions: what came of them is not their own doing."""
    aborted = [rollout.finish == "abort" for rollout in scored.group.rollouts]
    return replace(scored, rewards=float_row(np.where(aborted, np.nan, scored.rewards)))


def with_overlong(scored: Scored, settings: GRPOConfig) -> Scored:
    """The group with `soft_overlong` among its rewards: 0, falling to -1 over the last tokens before the limit.

    Source: Yu et al. 2025 (DAPO), soft overlong punishment.
    """
    cache = settings.soft_overlong_cache
    if cache is None:
        return scored
    free = settings.max_completion_length - cache
    lengths = np.array([rollout.tokens.size for rollout in scored.group.rollouts])
    change = -np.clip((lengths - free) / cache, 0, 1)
    return replace(
        scored,
        rewards=float_row(scored.rewards + change),
        parts={**scored.parts, SOFT_OVERLONG: tuple(change.tolist())},
    )


def is_trained_on(scored: Scored, settings: GRPOConfig) -> bool:
    """Whether the group has something to teach, as the estimator sees it, or is kept all the same."""
    if not settings.filter_zero_variance or settings.advantage_estimator == "reinforce_plus_plus":
        return True
    if settings.teacher_kl_coef > 0:
        return True
    if any(row.any() for row in scored.credits):
        return True
    if settings.advantage_estimator == "gdpo":
        return any(has_signal(float_row(row)) for row in values_by_function(scored))
    return has_signal(scored.rewards)


def _sampling(settings: GRPOConfig) -> SamplingSettings:
    return SamplingSettings(
        n=settings.num_generations,
        max_tokens=settings.max_completion_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop=settings.stop,
    )
