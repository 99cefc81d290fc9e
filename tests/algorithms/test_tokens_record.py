"""The loop with the fakes of test_grpo.py and a trainer that learns: what is recorded of tokens."""

from collections.abc import Mapping

import numpy as np
import pytest

from algorithms import grpo
from algorithms.data import Batch, FloatRow, float_row
from algorithms.prompts import PromptStream
from algorithms.roles import Roles
from tests.algorithms.test_grpo import Judge, Recorder, Sampler, Trainer, Weights, config, prompts


class Learner(Trainer):
    """Says -2 of every label, and a half more after every optimizer step."""

    def logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        self.calls.append("logprobs")
        value = -2.0 + 0.5 * self.calls.count("step")
        return tuple(tuple(float_row(0 * m.logprobs_T + value) for m in rank) for rank in batch.ranks)


def without_times(row: Mapping[str, float]) -> dict[str, str]:
    """Texts, in which a NaN is equal to another."""
    return {k: str(v) for k, v in row.items() if not k.startswith(("time/", "tokens_per_second"))}


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 2}])
def test_tokens_are_recorded_and_nothing_else_changes(settings: dict[str, object]) -> None:
    results = {}
    for every in (0, 3):
        trainer, sampler, recorder = Learner(), Sampler(), Recorder()
        judge = Judge([1.0, 0.0, float("nan"), 1.0])
        weights = Weights(sampler)
        roles = Roles(trainer=trainer, sampler=sampler, judge=judge, weights=weights, recorder=recorder)
        stream = PromptStream(prompts(), seed=0, shuffle=False)
        grpo.train(config(token_steps=every, scale_rewards="none", **settings), roles, stream, [])
        results[every] = trainer, recorder
    (plain, without), (trainer, recorder) = results[0], results[3]
    assert without.recorded == {}
    assert list(recorder.recorded) == [1, 3]
    ours, theirs = recorder.steps, without.steps
    assert list(map(without_times, ours)) == list(map(without_times, theirs))
    assert ["time/record" in row for row in ours] == [True, False, True]
    assert not any("time/record" in row for row in theirs)
    if settings:
        # Old log-probabilities were asked for anyway: one more pass at the end of steps 1 and 3.
        assert trainer.calls == [
            *("logprobs", "step", "step", "logprobs"),
            *("logprobs", "step", "step"),
            *("logprobs", "step", "step", "logprobs"),
        ]
    else:
        assert trainer.calls == ["logprobs", "step", "logprobs", "step", "logprobs", "step", "logprobs"]
    for one, other in zip(plain.batches, trainer.batches, strict=True):
        assert one.denominator == other.denominator
        for a, b in zip(one.ranks[0], other.ranks[0], strict=True):
            np.testing.assert_array_equal(a.tokens_T, b.tokens_T)
            np.testing.assert_array_equal(a.advantages_T, b.advantages_T)
    # The third step: p0 and p1 again, without completion 2, which has no reward.
    rows = recorder.recorded[3]
    assert [(row.prompt_id, row.index) for row in rows] == [(f"p{p}", i) for p in (0, 1) for i in (0, 1, 3)]
    assert [row.tokens.tolist() for row in rows] == [[0], [1], [3]] * 2
    assert [row.advantage for row in rows] == pytest.approx([1 / 3, -2 / 3, 1 / 3] * 2)
    steps = 2 if settings else 1
    for row in rows:
        assert row.logprobs.tolist() == [-1.0]
        assert row.trainer_logprobs.tolist() == [-2.0 + 0.5 * 2 * steps]
        assert row.updated_logprobs.tolist() == [-2.0 + 0.5 * 3 * steps]
