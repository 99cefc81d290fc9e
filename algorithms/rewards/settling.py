"""From what rewards said to the rewards of a group: weights, failed calls, and when failures end the run."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from algorithms.data import FloatRow, Group, Scored, Verdict, float_row
from algorithms.rewards.calling import RewardError
from configs.environment import ENVIRONMENT
from configs.rewards import OnError, RewardConfig, RewardWorkersConfig


class Settler:
    """Makes rewards of verdicts, as the `on_error` of each reward says, and keeps count of the failures."""

    def __init__(
        self,
        rewards: Mapping[str, RewardConfig],
        settings: RewardWorkersConfig,
        sources: Mapping[str, str] | None = None,
        environment_weight: float | None = None,
    ) -> None:
        """`sources` are the hashes of the rewards' files, which groups carry along.

        With an `environment_weight` what the environment gave is a reward named `environment`.
        """
        self._rewards, self._settings = dict(rewards), settings
        self._environment_weight = environment_weight
        self._weights = {name: config.weight for name, config in rewards.items()}
        if environment_weight is not None:
            self._weights[ENVIRONMENT] = environment_weight
        self._sources = dict(sources or {})
        self._calls = dict.fromkeys(rewards, 0)
        self._failed = {name: deque[bool](maxlen=settings.error_window) for name in rewards}

    def settle(self, group: Group, verdicts: Mapping[str, Sequence[Verdict]]) -> Scored:
        """The group with its rewards.

        Raises RewardError for a failure of a reward whose `on_error` is `fail`, of one of its first
        `loud_calls` calls, or when too many of its last calls failed.
        """
        size = len(group.rollouts)
        parts: dict[str, tuple[float | None, ...]] = {}
        dropped = np.zeros(size, np.bool_)
        for name, config in self._rewards.items():
            said = verdicts[name]
            self._count(name, config, said)
            parts[name] = tuple(_value(config, verdict) for verdict in said)
            for index, verdict in enumerate(said):
                match _rule(config, verdict):
                    case "drop_sample":
                        dropped[index] = True
                    case "drop_group":
                        dropped[:] = True
                    case _:
                        pass
        sums = np.where(dropped, np.nan, self._sums(parts, group))
        if self._environment_weight is not None:
            parts[ENVIRONMENT] = tuple(rollout.environment_reward or 0.0 for rollout in group.rollouts)
        return Scored(
            group=group,
            rewards=float_row(sums),
            parts=parts,
            weights=self._weights,
            sources=self._sources,
            verdicts={name: tuple(verdicts[name]) for name in self._rewards},
            credits=self._credits(group, verdicts),
        )

    def _count(self, name: str, config: RewardConfig, said: Sequence[Verdict]) -> None:
        window, settings = self._failed[name], self._settings
        for verdict in said:
            self._calls[name] += 1
            window.append(verdict.error is not None)
            rule = _rule(config, verdict)
            if verdict.error is not None and rule == "fail":
                raise RewardError(verdict.error)
            # What a model writes may take long; what fails at once is mostly wrong itself.
            if (
                verdict.error is not None
                and not verdict.timed_out
                and self._calls[name] <= settings.loud_calls
            ):
                raise RewardError(
                    f"{verdict.error}; on_error {rule} holds after the first "
                    f"{settings.loud_calls} calls of a reward (reward_workers.loud_calls)"
                )
            ratio = sum(window) / len(window)
            if len(window) == settings.error_window and ratio > settings.max_error_ratio:
                last = verdict.error or "the last call was well"
                raise RewardError(
                    f"reward {name}: {sum(window)} of its last {len(window)} calls failed, more than "
                    f"reward_workers.max_error_ratio {settings.max_error_ratio:g} allows: {last}"
                )

    def _sums(self, parts: Mapping[str, Sequence[float | None]], group: Group) -> list[float]:
        sums: list[float] = []
        for index, rollout in enumerate(group.rollouts):
            values = [(config.weight, parts[name][index]) for name, config in self._rewards.items()]
            known = [weight * value for weight, value in values if value is not None]
            given, weight = rollout.environment_reward, self._environment_weight
            # Nothing given is 0, but does not make up for functions of which none applied.
            if weight is not None and (given is not None or known or not values):
                known.append(weight * (given or 0.0))
            sums.append(math.fsum(known) if known else math.nan)
        return sums

    def _credits(self, group: Group, verdicts: Mapping[str, Sequence[Verdict]]) -> tuple[FloatRow, ...]:
        """What spans give each token of each completion, times the reward's weight. Raises RewardError."""
        if not any(verdict.spans for said in verdicts.values() for verdict in said):
            return ()
        rows = [np.zeros(rollout.tokens.size) for rollout in group.rollouts]
        for name, config in self._rewards.items():
            for index, (row, verdict) in enumerate(zip(rows, verdicts[name], strict=True)):
                for span in verdict.spans:
                    if not 0 <= span.start <= span.end <= row.size:
                        raise RewardError(
                            f"reward {name}: prompt {group.prompt.id}, completion {index}: gave a span from token "
                            f"{span.start} to {span.end}; the completion has {row.size} tokens"
                        )
                    row[span.start : span.end] += config.weight * span.value
        return tuple(float_row(row) for row in rows)


def _rule(config: RewardConfig, verdict: Verdict) -> OnError | None:
    """What a call that failed counts as; None for one that did not."""
    if verdict.error is None:
        return None
    return config.when_late if verdict.timed_out else config.on_error


def _value(config: RewardConfig, verdict: Verdict) -> float | None:
    return 0.0 if _rule(config, verdict) == "zero" else verdict.value
