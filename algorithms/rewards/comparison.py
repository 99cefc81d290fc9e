"""A reward on stored rollouts, alone or against another: values, disagreements, and signal gained or lost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from algorithms.advantages import has_signal
from algorithms.content_text import text_of
from algorithms.data import Verdict, float_row
from algorithms.stored_rollouts import StoredGroup

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One completion, and what the two said of it."""

    step: int
    prompt_id: str
    index: int
    prompt: str
    completion: str
    new: float | None
    old: float | None
    seconds: float
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Values of one reward over completions; `quantiles` are the minimum, 10, 50, 90 % and the maximum."""

    count: int
    none: int
    errors: int
    mean: float
    std: float
    quantiles: tuple[float, ...]
    distinct: int
    bins: tuple[tuple[float, float, int], ...]
    """Edges of equal parts of the range, and how many values are in each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signal:
    """Groups by whether their rewards differ, which is what there is to learn from: `kept` under both rewards."""

    groups: int
    new: int
    old: int
    gained: tuple[str, ...]
    """`step 3, train-7` of groups in which only the new one differs."""
    lost: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All that is said of a new reward, and of an old one where there is one."""

    cases: tuple[Case, ...]
    new: Distribution
    old: Distribution | None
    signal: Signal

    @property
    def disagreements(self) -> list[Case]:
        """Where the two differ, the most first; a value and None differ most."""
        return sorted((case for case in self.cases if _distance(case) > 0), key=_distance, reverse=True)

    @property
    def slowest(self) -> list[Case]:
        """The calls that took longest first."""
        return sorted(self.cases, key=lambda case: case.seconds, reverse=True)

    @property
    def failed(self) -> list[Case]:
        """Calls of the new reward that failed."""
        return [case for case in self.cases if case.error is not None]

    @property
    def correlation(self) -> float:
        """Pearson's, over completions that have both values; NaN where one of them does not vary."""
        pairs = [(case.new, case.old) for case in self.cases if case.new is not None and case.old is not None]
        if len(pairs) < 2:
            return math.nan
        table: Values = np.array(pairs, np.float64)
        new, old = table[:, 0], table[:, 1]
        if new.std() == 0 or old.std() == 0:
            return math.nan
        return float(np.corrcoef(new, old)[0, 1])


def compare(
    groups: Sequence[StoredGroup],
    new: Sequence[Sequence[Verdict]],
    old: Sequence[Sequence[float | None]] | None,
) -> Comparison:
    """`new` are verdicts and `old` values, by group and completion."""
    cases: list[Case] = []
    for place, (stored, said) in enumerate(zip(groups, new, strict=True)):
        prompt = stored.group.prompt
        for index, (rollout, verdict) in enumerate(zip(stored.group.rollouts, said, strict=True)):
            cases.append(
                Case(
                    step=stored.step,
                    prompt_id=prompt.id,
                    index=index,
                    prompt=text_of(prompt.messages[-1]["content"]) if prompt.messages else "",
                    completion=rollout.text,
                    new=verdict.value,
                    old=None if old is None else old[place][index],
                    seconds=verdict.seconds,
                    error=verdict.error,
                )
            )
    return Comparison(
        cases=tuple(cases),
        new=_distribution([case.new for case in cases], sum(case.error is not None for case in cases)),
        old=None if old is None else _distribution([case.old for case in cases], 0),
        signal=_signal(groups, [[verdict.value for verdict in said] for said in new], old),
    )


def _distance(case: Case) -> float:
    if case.new is None or case.old is None:
        return 0.0 if case.new is case.old else math.inf
    return abs(case.new - case.old)


def _distribution(values: Sequence[float | None], errors: int) -> Distribution:
    known = np.array([value for value in values if value is not None], np.float64)
    quantiles: tuple[float, ...] = ()
    bins: list[tuple[float, float, int]] = []
    if known.size:
        quantiles = tuple(np.quantile(known, [0, 0.1, 0.5, 0.9, 1]).tolist())
        counts, edges = np.histogram(known, bins=10 if known.min() < known.max() else 1)
        bins = list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))
    return Distribution(
        count=len(values),
        none=len(values) - known.size - errors,
        errors=errors,
        mean=float(known.mean()) if known.size else math.nan,
        std=float(known.std()) if known.size else math.nan,
        quantiles=quantiles,
        distinct=len(set(known.tolist())),
        bins=tuple(bins),
    )


def _signal(
    groups: Sequence[StoredGroup],
    new: Sequence[Sequence[float | None]],
    old: Sequence[Sequence[float | None]] | None,
) -> Signal:
    names = [f"step {each.step}, {each.group.prompt.id}" for each in groups]
    has_new = [_has_signal(values) for values in new]
    has_old = has_new if old is None else [_has_signal(values) for values in old]
    rows = list(zip(names, has_new, has_old, strict=True))
    return Signal(
        groups=len(groups),
        new=sum(has_new),
        old=sum(has_old),
        gained=tuple(name for name, now, before in rows if now and not before),
        lost=tuple(name for name, now, before in rows if before and not now),
    )


def _has_signal(values: Sequence[float | None]) -> bool:
    return has_signal(float_row([math.nan if value is None else value for value in values]))
