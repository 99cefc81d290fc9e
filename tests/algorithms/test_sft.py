"""The loop with a trainer that knows its log-probabilities, so that the held-out loss can be computed."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest

from algorithms import sft
from algorithms.data import Batch, FloatRow, Scored, StepResult, TrainSample, float_row, int_row
from algorithms.prompts import PromptStream
from configs.schema import RunConfig


def config(**settings: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "algorithm": "sft",
            "max_steps": 5,
            "model": {"model": "m"},
            "data": {"dataset": "d"},
            "trainer": {"data_parallel_size": 2, "micro_batch_size": 1},
            "sft": {"batch_size": 3},
            **settings,
        }
    )


class Trainer:
    """After step n a label's log-probability is minus the label times the n-th factor."""

    def __init__(self, *factors: float) -> None:
        self.factors = factors
        self.steps = 0
        self.rated: dict[int, float] = {}

    def step(self, batch: Batch) -> StepResult:
        self.steps += 1
        return StepResult(loss=1.0, grad_norm=2.0, learning_rate=0.1, metrics={})

    def logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        factor = self.factors[self.steps]
        return tuple(tuple(float_row(-factor * micro.labels_T) for micro in rank) for rank in batch.ranks)

    def rate(self, step: int, score: float) -> None:
        self.rated[step] = score

    def entropies(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        raise AssertionError("sft chooses no tokens by them")

    def move_reference(self, share: float) -> None:
        raise AssertionError("sft has no reference")

    def reference_logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        raise AssertionError("sft has no reference")

    def save(self, step: int) -> None:
        raise AssertionError("save_steps is 0")


class Recorder:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def rollouts(self, step: int, scored: Iterable[Scored]) -> None:
        raise AssertionError("there are none")

    def evaluation(self, step: int, scored: Iterable[Scored], metrics: Mapping[str, float]) -> None:
        assert not list(scored)
        self.evaluations.append((step, dict(metrics)))


def sample(tokens: list[int], mask: list[int]) -> TrainSample:
    zeros = float_row(np.zeros(len(tokens)))
    return TrainSample(
        tokens=int_row(tokens), loss_mask=int_row(mask), advantages=zeros, logprobs=zeros, version=0
    )


# Trained tokens 5, 7, 2, 1 and 3; 100 is never one.
HELD_OUT = [
    sample([100, 5, 100, 7], [0, 1, 0, 1]),
    sample([100, 2], [0, 1]),
    sample([100, 100, 1], [0, 0, 1]),
    sample([100, 3, 100], [0, 1, 0]),
]


def run(settings: RunConfig, held_out: list[TrainSample]) -> Recorder:
    recorder = Recorder()
    stream = PromptStream(HELD_OUT, seed=0, shuffle=True)
    sft.train(settings, Trainer(1.0, 0.9, 0.5, 0.7, 0.25, 0.5), stream, held_out, recorder)
    assert recorder.steps == [1, 2, 3, 4, 5]
    return recorder


def test_held_out_loss_is_a_mean_over_tokens_before_between_and_after() -> None:
    mean = (5 + 7 + 2 + 1 + 3) / 5
    evaluations = run(config(eval_steps=2), HELD_OUT).evaluations
    assert [step for step, _ in evaluations] == [0, 2, 4, 5]
    losses = [metrics["eval/loss"] for _, metrics in evaluations]
    assert losses == pytest.approx([mean, 0.5 * mean, 0.25 * mean, 0.5 * mean])
    best = [metrics["eval/best_loss"] for _, metrics in evaluations]
    assert best == pytest.approx([mean, 0.5 * mean, 0.25 * mean, 0.25 * mean])
    assert {metrics["eval/num_tokens"] for _, metrics in evaluations} == {5.0}
    assert [step for step, _ in run(config(), HELD_OUT).evaluations] == [0, 5]


def test_without_held_out_samples_nothing_is_evaluated() -> None:
    assert run(config(eval_steps=2), []).evaluations == []
