"""The roles a training loop is written against. actors/ implements them; tests use small fakes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from algorithms.data import (
    Batch,
    FloatRow,
    Group,
    MicroBatch,
    Prompt,
    SamplingSettings,
    Scored,
    StepResult,
    TokenRecord,
    TopTokens,
    TrainSample,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """What the policy says of each token of a micro-batch, float32 [T]; the loss is differentiated through it.

    `logprobs_T` are those of the labels, `entropy_T` is the entropy over the vocabulary in nats, both of the
    distribution at the loss's temperature. `divergence_T` is the divergence from a teacher, None without one.
    """

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor
    divergence_T: torch.Tensor | None = None


TokenLoss = Callable[[Predictions, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""-> (sum of the loss's terms, each times its weight; sums over the loss tokens by metric name, the same names
for every micro-batch). Nothing in it divides by a count: the caller does, once."""


class Trainer(Protocol):
    """The policy, and the reference when the run has one."""

    def step(self, batch: Batch) -> StepResult:
        """One optimizer step with the loss of the run."""
        ...

    def logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """Policy log-probabilities of the labels, by rank and micro-batch, each of length T."""
        ...

    def reference_logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """The same under the reference."""
        ...

    def teacher_logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """The same under a teacher that the trainer has."""
        ...

    def entropies(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """Entropy of the policy at each token in nats, by rank and micro-batch, each of length T."""
        ...

    def move_reference(self, share: float) -> None:
        """Let the reference be `share` of the policy and the rest of what it was."""
        ...

    def save(self, step: int) -> None:
        """Write a checkpoint of this step."""
        ...

    def rate(self, step: int, score: float) -> None:
        """How good the weights of this step are, the more the better; the best checkpoint is marked."""
        ...


class TopTeacher(Protocol):
    """A teacher that is asked for its likeliest tokens, wherever it runs."""

    def top_tokens(self, samples: Sequence[TrainSample]) -> list[TopTokens]:
        """Of each sample, as many tokens in place of each of its tokens."""
        ...


class TokenTeacher(Protocol):
    """A teacher that is asked what it thinks of the tokens that are there, wherever it runs."""

    def token_logprobs(self, samples: Sequence[TrainSample]) -> list[FloatRow]:
        """Of each sample the log-probability of each of its tokens, 0 for the first, at temperature 1."""
        ...


class Sampler(Protocol):
    """Rollout engines."""

    def generate(self, requests: Iterable[tuple[Prompt, SamplingSettings]]) -> Iterator[Group]:
        """Groups in the order they finish. Sampling begins with the call, not with the first `next`."""
        ...


class Judge(Protocol):
    """Reward functions, wherever they run."""

    def begin(self, step: int) -> None:
        """A step begins: from here on, and not within a step, other rewards may be used."""
        ...

    def score(self, groups: Iterable[Group]) -> Iterator[Scored]:
        """Each group with its rewards, in the order they finish; scoring overlaps `groups`."""
        ...


class WeightSync(Protocol):
    """The way of weights from the trainer to the sampler."""

    def sync(self, version: int) -> Mapping[str, float]:
        """Give every engine the trainer's weights under this version number; returns timings and sizes."""
        ...


class Recorder(Protocol):
    """Where a run writes what happened."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step."""
        ...

    def rollouts(self, step: int, scored: Iterable[Scored]) -> None:
        """Every completion of a step with its rewards."""
        ...

    def evaluation(self, step: int, scored: Iterable[Scored], metrics: Mapping[str, float]) -> None:
        """Completions and metrics of one evaluation."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """The body of a `with` statement is this phase."""
        ...

    def tokens(self, step: int, records: Iterable[TokenRecord]) -> None:
        """What was thought of every token of a step's completions."""
        ...

    def event(self, step: int, kind: str, text: str, **details: object) -> None:
        """Something that happened besides the steps: `kind` is a word to sort by, `text` is for a person."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """Everything the GRPO loop talks to. `teacher` is None where there is none, or the trainer has it."""

    trainer: Trainer
    sampler: Sampler
    judge: Judge
    weights: WeightSync
    recorder: Recorder
    teacher: TokenTeacher | None = None
