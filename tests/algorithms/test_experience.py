"""What a generation step trains on, with a trainer whose answers can be read off the tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from algorithms.data import (
    Batch,
    FloatRow,
    Group,
    Prompt,
    Rollout,
    Scored,
    StepResult,
    TrainSample,
    float_row,
    int_row,
)
from algorithms.distillation import distillation_advantages
from algorithms.experience import gather, optimizer_batches, untrained
from algorithms.packing import Rows, pack
from algorithms.policy_loss import policy_loss
from algorithms.roles import Predictions
from algorithms.rollouts import is_trained_on
from configs.schema import RunConfig, TrainerConfig


class Trainer:
    """Log-probabilities are minus a hundredth of the label, the reference's twice that, the teacher's three times;
    entropies the label."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def step(self, batch: Batch) -> StepResult:
        raise AssertionError("not in this test")

    def save(self, step: int) -> None:
        raise AssertionError("not in this test")

    def rate(self, step: int, score: float) -> None:
        raise AssertionError("not in this test")

    def move_reference(self, share: float) -> None:
        raise AssertionError("not in this test")

    def logprobs(self, batch: Batch) -> Rows:
        return self._rows("policy", batch, -0.01)

    def reference_logprobs(self, batch: Batch) -> Rows:
        return self._rows("reference", batch, -0.02)

    def teacher_logprobs(self, batch: Batch) -> Rows:
        return self._rows("teacher", batch, -0.03)

    def entropies(self, batch: Batch) -> Rows:
        return self._rows("entropies", batch, 1.0)

    def _rows(self, name: str, batch: Batch, factor: float) -> tuple[tuple[FloatRow, ...], ...]:
        self.asked.append(name)
        return tuple(tuple(float_row(micro.labels_T * factor) for micro in rank) for rank in batch.ranks)


def config(**settings: object) -> RunConfig:
    teacher = {"teacher_model": "t"} if "teacher_kl_coef" in settings else {}
    return RunConfig.model_validate(
        {
            "model": {"model": "m", **teacher},
            "data": {"dataset": "d"},
            "grpo": {"num_generations": 2, "max_completion_length": 4, "scale_rewards": "none", **settings},
            "rewards": [{"function": "r"}],
        }
    )


def rollout(tokens: list[int], finish: str = "stop") -> Rollout:
    return Rollout(
        tokens=int_row(tokens),
        logprobs=float_row([-1.0] * len(tokens)),
        text="",
        finish="length" if finish == "length" else "stop",
        loss_mask=int_row([1] * len(tokens)),
        versions=(0, 0),
    )


def group(rewards: list[float], *rollouts: Rollout) -> Scored:
    prompt = Prompt(id="p", tokens=int_row([1, 2]), messages=(), columns={})
    return Scored(
        group=Group(prompt=prompt, rollouts=rollouts), rewards=float_row(rewards), parts={"r": tuple(rewards)}
    )


GROUPS = [
    group([1.0, 0.0], rollout([10, 11]), rollout([20, 21, 22, 23], "length")),
    group([0.0, 1.0], rollout([30]), rollout([40, 41, 42])),
]


def test_samples_carry_what_the_loss_asks_for_and_nothing_else() -> None:
    trainer = Trainer()
    plain = gather(GROUPS, config(), trainer).samples
    assert trainer.asked == []
    assert [sample.old_logprobs for sample in plain] == [None] * 4
    full = gather(GROUPS, config(beta=0.1, num_iterations=2), trainer).samples
    assert trainer.asked == ["reference", "policy"]
    for sample in full:
        assert sample.old_logprobs is not None
        assert sample.ref_logprobs is not None
        np.testing.assert_allclose(sample.old_logprobs[1:], sample.tokens[1:] * -0.01)
        np.testing.assert_allclose(sample.ref_logprobs[1:], sample.tokens[1:] * -0.02)
        assert sample.policy_mask is None
    np.testing.assert_array_equal(full[0].advantages, [0, 0, 0.5, 0.5])
    np.testing.assert_array_equal(full[2].advantages, [0, 0, -0.5])


def test_credits_of_spans_are_added_to_the_advantages_of_their_tokens() -> None:
    first = replace(GROUPS[0], credits=(float_row([0.0, 0.25]), float_row([-1.0, 0.0, 0.0, 0.0])))
    samples = gather([first, GROUPS[1]], config(mask_truncated_completions=False), Trainer()).samples
    np.testing.assert_array_equal(samples[0].advantages, [0, 0, 0.5, 0.75])
    np.testing.assert_array_equal(samples[1].advantages, [0, 0, -1.5, -0.5, -0.5, -0.5])
    np.testing.assert_array_equal(samples[2].advantages, [0, 0, -0.5])
    # The completion that is left out takes its credits along.
    masked = gather([first], config(mask_truncated_completions=True), Trainer()).samples
    np.testing.assert_array_equal(masked[0].advantages, [0, 0, 0.5, 0.75])
    # Equal rewards with credits are something to learn from.
    equal = replace(first, rewards=float_row([1.0, 1.0]))
    assert is_trained_on(equal, config().grpo)
    assert not is_trained_on(replace(equal, credits=()), config().grpo)


def test_a_teacher_judges_every_token_with_or_without_rewards() -> None:
    """Teacher minus policy is -0.02 times the token."""
    trainer, settings = Trainer(), config(teacher_kl_coef=0.5)
    taught = gather(GROUPS, settings, trainer)
    assert trainer.asked == ["policy", "teacher"]
    np.testing.assert_allclose(taught.samples[0].advantages, [0, 0, 0.5 - 0.1, 0.5 - 0.11], rtol=1e-6)
    np.testing.assert_allclose(taught.samples[2].advantages, [0, 0, -0.5 - 0.3], rtol=1e-6)
    tokens = [10, 11, 20, 21, 22, 23, 30, 40, 41, 42]
    assert taught.metrics["teacher_kl"] == pytest.approx(0.02 * np.mean(tokens), rel=1e-6)

    class Elsewhere:
        def token_logprobs(self, samples: Sequence[TrainSample]) -> list[FloatRow]:
            return [float_row(np.zeros(sample.tokens.size)) for sample in samples]

    unknown = group([np.nan, np.nan], rollout([10, 11]), rollout([20, 21], "length"))
    assert is_trained_on(unknown, settings.grpo)
    (first, second) = gather([unknown], settings, trainer, Elsewhere()).samples
    np.testing.assert_allclose(first.advantages, [0, 0, 0.05, 0.055], rtol=1e-6)
    np.testing.assert_allclose(second.advantages, [0, 0, 0.1, 0.105], rtol=1e-6)


def test_the_mean_step_towards_a_teacher_is_down_the_reverse_kl() -> None:
    """Over all tokens, each as often as the policy samples it: torch's gradient of KL(policy, teacher)."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    teacher = torch.log_softmax(torch.randn(5, generator=torch.Generator().manual_seed(2)), 0)
    policy = torch.log_softmax(logits, 0)
    (want,) = torch.autograd.grad((policy.exp() * (policy - teacher)).sum(), logits, retain_graph=True)
    loss, got = policy_loss(config(teacher_kl_coef=1.0).grpo), torch.zeros(5)
    for token, probability in enumerate(policy.exp().tolist()):
        ours, theirs = (float_row([0.0, float(row[token])]) for row in (policy.detach(), teacher))
        sample = TrainSample(
            tokens=int_row([0, token]),
            loss_mask=int_row([0, 1]),
            advantages=float_row([0.0, 0.0]),
            logprobs=ours,
            version=0,
        )
        judged = replace(sample, advantages=distillation_advantages(sample, ours, theirs, 1.0))
        (micro,) = pack([judged], TrainerConfig()).ranks[0]
        predictions = Predictions(
            logprobs_T=torch.stack([policy[token], torch.zeros(())]), entropy_T=torch.zeros(2)
        )
        total, _ = loss(predictions, micro)
        (gradient,) = torch.autograd.grad(total, logits, retain_graph=True)
        got += probability * gradient
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_masked_truncated_completion_counts_in_the_mean_but_is_not_trained_on() -> None:
    samples = gather(GROUPS, config(mask_truncated_completions=True), Trainer()).samples
    assert [sample.tokens.tolist()[2:] for sample in samples] == [[10, 11], [30], [40, 41, 42]]
    assert samples[0].advantages[-1] == 0.5


def test_a_step_in_which_all_is_masked_says_so() -> None:
    cut = group([1.0, 0.0], rollout([10], "length"), rollout([20], "length"))
    empty = group([1.0, 0.0], rollout([30]), rollout([]))
    settings = config(mask_truncated_completions=True).grpo
    assert untrained([cut, empty], settings) == (
        "Of its 4 completions 2 were cut at max_completion_length, and mask_truncated_completions leaves those "
        "out, 1 are in groups whose rewards are all equal (the task is too hard or too easy for the model, or the "
        "reward is constant), 1 have no token"
    )


def test_kl_in_reward_lowers_the_reward_by_the_summed_difference() -> None:
    samples = gather(GROUPS, config(beta=0.5, kl_in_reward=True), Trainer()).samples
    # log policy - log reference is a hundredth of each token.
    rewards = [1 - 0.5 * 0.21, 0 - 0.5 * 0.86]
    assert samples[0].advantages[-1] == pytest.approx((rewards[0] - rewards[1]) / 2, rel=1e-5)
    assert samples[1].advantages[-1] == pytest.approx((rewards[1] - rewards[0]) / 2, rel=1e-5)


def test_the_most_uncertain_tokens_are_those_of_the_whole_step() -> None:
    experience = gather(GROUPS, config(top_entropy_quantile=0.4), Trainer())
    masks = [sample.policy_mask for sample in experience.samples]
    chosen = {
        int(token)
        for sample, mask in zip(experience.samples, masks, strict=True)
        if mask is not None
        for token in sample.tokens[mask > 0]
    }
    assert chosen == {30, 40, 41, 42}
    assert 23 < experience.metrics["entropy_threshold"] <= 30


def test_denominators_are_of_the_generation_step_for_dapo_and_of_the_part_for_the_others() -> None:
    samples = gather(GROUPS, config(), Trainer()).samples
    # Of 10 tokens in two optimizer steps, the parts have 2 + 1 and 4 + 3.
    wanted = {
        "dapo": [5, 5],
        "cispo": [5, 5],
        "bnpo": [3, 7],
        "dr_grpo": [8, 8],
        "grpo": [2, 2],
        "sapo": [2, 2],
    }
    for loss_type, denominators in wanted.items():
        run = config(loss_type=loss_type, steps_per_generation=2)
        batches = optimizer_batches(samples, run)
        assert [batch.denominator for batch in batches] == denominators, loss_type
        assert [batch.num_loss_tokens for batch in batches] == [3, 7]


def test_a_completion_of_no_tokens_is_not_trained_on() -> None:
    empty = replace(GROUPS[1], group=replace(GROUPS[1].group, rollouts=(rollout([]), rollout([40]))))
    (sample,) = gather([empty], config(), Trainer()).samples
    assert sample.tokens.tolist() == [1, 2, 40]
    assert optimizer_batches([], config()) == []


def test_tokens_of_observations_have_no_advantage_and_no_gradient() -> None:
    observed = replace(rollout([10, 11, 12]), loss_mask=int_row([1, 0, 1]), logprobs=float_row([-1, 0, -1]))
    groups = [group([1.0, 0.0], observed, rollout([20, 21]))]
    samples = gather(groups, config(), Trainer()).samples
    np.testing.assert_array_equal(samples[0].advantages, [0, 0, 0.5, 0, 0.5])

    def gradient(advantage: float, logprob: float) -> tuple[list[float], dict[str, float]]:
        changed = [*samples[0].advantages[:3], advantage, samples[0].advantages[4]]
        engine = [*samples[0].logprobs[:3], logprob, samples[0].logprobs[4]]
        sample = replace(samples[0], advantages=float_row(changed), logprobs=float_row(engine))
        (batch,) = optimizer_batches([sample], config(importance_sampling_level="sequence"))
        micro = batch.ranks[0][0]
        row = torch.full((micro.tokens_T.size,), -0.9, requires_grad=True)
        loss = policy_loss(config(importance_sampling_mode="sequence_truncate").grpo)
        value, sums = loss(Predictions(logprobs_T=row, entropy_T=row.detach()), micro)
        value.backward()
        assert row.grad is not None
        return row.grad.tolist(), {name: float(each) for name, each in sums.items()}

    assert gradient(0.0, 0.0) == gradient(7.0, -5.0)
    # The prediction of the observation is the third.
    assert [value != 0 for value in gradient(0.0, 0.0)[0][:4]] == [False, True, False, True]
