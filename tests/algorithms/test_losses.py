"""Losses against their formulas, written out in plain floats over two sequences and padding."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.data import MicroBatch, float_row, int_row
from algorithms.losses import sft_loss
from algorithms.policy_loss import policy_loss
from algorithms.roles import Predictions
from configs.grpo import GRPOConfig

# Two sequences, of three and of two tokens, and padding; the fourth entry is the end of the first sequence, which
# predicts nothing. What is masked must not leak in as inf or NaN.
CURRENT = [-0.5, -1.0, -2.0, -7.0, -0.1, -0.7, -3.0]
OLD = [-0.9, -1.0, -1.5, -8.0, -0.4, -0.9, -9.0]
ENGINE = [-0.8, -1.9, -1.4, 40.0, -0.4, -0.2, 50.0]
REFERENCE = [-0.6, -1.2, -1.0, 60.0, -0.1, -2.0, -40.0]
ADVANTAGES = [1.5, 1.5, 1.5, 100.0, -0.7, -0.7, 100.0]
WEIGHTS = [0.5, 0.5, 0.5, 0.0, 2.0, 2.0, 0.0]
ENTROPY = [1.0, 2.0, 0.5, 70.0, 1.5, 0.2, 80.0]
MASK = [1, 1, 1, 0, 1, 1, 0]
SEQUENCES = [[0, 1, 2], [4, 5]]
USED = [token for sequence in SEQUENCES for token in sequence]


def micro_batch(**rows: Any) -> MicroBatch:
    zeros = int_row([0] * 7)
    micro = MicroBatch(
        tokens_T=zeros,
        labels_T=zeros,
        positions_T=zeros,
        starts_S=int_row([0, 4, 6, 7]),
        samples_S=(0, 1, -1),
        loss_mask_T=int_row(MASK),
        weights_T=float_row(WEIGHTS),
        advantages_T=float_row(ADVANTAGES),
        logprobs_T=float_row(ENGINE),
        old_logprobs_T=float_row(OLD),
        ref_logprobs_T=float_row(REFERENCE),
    )
    return replace(micro, **rows)


def predictions(logprobs: torch.Tensor | None = None) -> Predictions:
    return Predictions(
        logprobs_T=torch.tensor(CURRENT) if logprobs is None else logprobs, entropy_T=torch.tensor(ENTROPY)
    )


def mean(token: int, values: list[float]) -> float:
    (own,) = (sequence for sequence in SEQUENCES if token in sequence)
    return sum(values[other] for other in own) / len(own)


LOG_RATIO = [current - old for current, old in zip(CURRENT, OLD, strict=True)]
LOG_SAMPLED = [old - engine for old, engine in zip(OLD, ENGINE, strict=True)]


def clipped(ratio: float, advantage: float, low: float = 0.2, high: float = 0.2) -> float:
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def term(settings: GRPOConfig, token: int) -> float:
    ratio, advantage = math.exp(LOG_RATIO[token]), ADVANTAGES[token]
    if settings.importance_sampling_level != "token":
        ratio = math.exp(mean(token, LOG_RATIO))
    if settings.loss_type == "cispo":
        cap = 5.0 if settings.epsilon_high is None else settings.epsilon_high
        return -min(ratio, cap) * advantage * CURRENT[token]
    if settings.loss_type == "sapo":
        tau = settings.sapo_temperature_pos if advantage > 0 else settings.sapo_temperature_neg
        return -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    plain = clipped(ratio, advantage, settings.epsilon, high)
    if settings.delta is not None and advantage < 0:
        # The dual clip as verl writes it.
        plain = min(plain, -settings.delta * advantage)
    return plain


def sampler_weight(settings: GRPOConfig, token: int) -> float:
    if not settings.importance_sampling_correction:
        return 1.0
    cap, low = settings.importance_sampling_cap, settings.importance_sampling_min or 0.0
    own = math.exp(LOG_SAMPLED[token])
    total = mean(token, LOG_SAMPLED)
    if settings.importance_sampling_ratio == "product":
        total *= len(next(each for each in SEQUENCES if token in each))
    whole = math.exp(total)
    match settings.importance_sampling_mode:
        case "token_truncate":
            return min(own, cap)
        case "token_mask":
            return own if low <= own <= cap else 0.0
        case "sequence_truncate":
            return min(whole, cap)
        case "sequence_mask":
            inside = low <= whole <= cap
            weight = whole if settings.importance_sampling_ratio == "product" else min(own, cap)
            return weight if inside else 0.0


def kl(settings: GRPOConfig, token: int) -> float:
    gap = CURRENT[token] - REFERENCE[token]
    value = {"k1": gap, "k2": gap**2 / 2, "k3": math.exp(-gap) - 1 + gap}[settings.kl_estimator]
    return value * math.exp(LOG_RATIO[token]) if settings.use_bias_correction_kl else value


def by_hand(settings: GRPOConfig) -> float:
    total = 0.0
    for token in USED:
        policy = term(settings, token) * sampler_weight(settings, token)
        threshold = settings.off_policy_mask_threshold
        drift = mean(token, [engine - current for engine, current in zip(ENGINE, CURRENT, strict=True)])
        if threshold is not None and ADVANTAGES[token] < 0 and drift > threshold:
            policy = 0.0
        penalty = 0.0 if settings.kl_in_reward else settings.beta * kl(settings, token)
        total += WEIGHTS[token] * (policy + penalty - settings.entropy_coef * ENTROPY[token])
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epsilon_high": 0.28},
        {"epsilon": 0.1, "importance_sampling_correction": False},
        {"delta": 1.21, "importance_sampling_correction": False},
        {"importance_sampling_level": "sequence"},
        {"importance_sampling_level": "sequence_token"},
        {"loss_type": "cispo"},
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"loss_type": "cispo", "importance_sampling_level": "sequence_token"},
        {"loss_type": "sapo"},
        {"loss_type": "sapo", "importance_sampling_level": "sequence", "sapo_temperature_neg": 3.0},
        {"importance_sampling_cap": 0.7},
        {"importance_sampling_mode": "token_mask", "importance_sampling_min": 0.8},
        {"importance_sampling_mode": "sequence_truncate", "importance_sampling_cap": 1.1},
        {"importance_sampling_mode": "sequence_truncate", "importance_sampling_ratio": "product"},
        {"importance_sampling_mode": "sequence_mask", "importance_sampling_min": 0.9},
        {
            "importance_sampling_mode": "sequence_mask",
            "importance_sampling_ratio": "product",
            "importance_sampling_min": 0.5,
        },
        {"off_policy_mask_threshold": 0.05},
        {"off_policy_mask_threshold": 0.5},
        {"beta": 0.3},
        {"beta": 0.3, "kl_estimator": "k1"},
        {"beta": 0.3, "kl_estimator": "k2", "use_bias_correction_kl": True},
        {"beta": 0.3, "use_bias_correction_kl": True},
        {"beta": 0.3, "kl_in_reward": True},
        {"entropy_coef": 0.4},
    ],
    ids=str,
)
def test_the_loss_equals_its_formula_written_out(settings: dict[str, Any]) -> None:
    config = GRPOConfig.model_validate(settings)
    loss, _ = policy_loss(config)(predictions(), micro_batch())
    assert loss.item() == pytest.approx(by_hand(config), rel=1e-5)


def gradient(micro: MicroBatch, **settings: Any) -> np.ndarray:
    logprobs = torch.tensor(CURRENT, requires_grad=True)
    config = GRPOConfig.model_validate({"importance_sampling_correction": False, **settings})
    loss, _ = policy_loss(config)(predictions(logprobs), micro)
    loss.backward()
    assert logprobs.grad is not None
    return logprobs.grad.numpy()


def test_gradient_is_zero_where_clipped_or_masked_and_follows_the_ratio_elsewhere() -> None:
    ratios = np.exp(LOG_RATIO)
    expected = np.zeros(7)
    # Tokens 1 and 2 have a ratio below 1.2 and a positive advantage, 4 and 5 one above 0.8 and a negative one.
    for token in (1, 2, 4, 5):
        expected[token] = -WEIGHTS[token] * ratios[token] * ADVANTAGES[token]
    np.testing.assert_allclose(gradient(micro_batch()), expected, rtol=1e-5, atol=1e-12)


def test_a_sequence_ratio_spreads_its_gradient_and_gspo_token_does_not() -> None:
    only_first = micro_batch(weights_T=float_row([1.0, 0, 0, 0, 0, 0, 0]))
    ratio = math.exp(mean(0, LOG_RATIO))
    spread = gradient(only_first, importance_sampling_level="sequence")
    np.testing.assert_allclose(spread, [-ratio * 1.5 / 3] * 3 + [0] * 4, rtol=1e-5)
    own = gradient(only_first, importance_sampling_level="sequence_token")
    np.testing.assert_allclose(own, [-ratio * 1.5] + [0] * 6, rtol=1e-5)


def test_cispo_has_the_gradient_of_a_weighted_log_probability() -> None:
    expected = [
        -weight * min(math.exp(gap), 1.3) * advantage
        for weight, gap, advantage in zip(WEIGHTS, LOG_RATIO, ADVANTAGES, strict=True)
    ]
    got = gradient(micro_batch(), loss_type="cispo", epsilon_high=1.3)
    np.testing.assert_allclose(got, np.multiply(expected, MASK), rtol=1e-5)


def test_without_old_logprobs_the_ratio_is_one_but_has_a_gradient() -> None:
    got = gradient(micro_batch(old_logprobs_T=None))
    np.testing.assert_allclose(got, -np.multiply(WEIGHTS, ADVANTAGES) * MASK, rtol=1e-6)


def test_tokens_without_a_policy_term_keep_their_kl_term() -> None:
    chosen = int_row([1, 0, 0, 0, 0, 1, 0])
    config = GRPOConfig(beta=0.3)
    loss, _ = policy_loss(config)(predictions(), micro_batch(policy_mask_T=chosen))
    want = sum(
        WEIGHTS[token]
        * (chosen[token] * term(config, token) * sampler_weight(config, token) + 0.3 * kl(config, token))
        for token in USED
    )
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_metrics_are_sums_over_loss_tokens() -> None:
    config = GRPOConfig(beta=0.1, importance_sampling_cap=1.2)
    _, sums = policy_loss(config)(predictions(), micro_batch())
    gaps = [LOG_SAMPLED[token] for token in USED]
    assert sums["clip_ratio/high_mean"].item() == 1
    assert sums["clip_ratio/low_mean"].item() == 0
    assert sums["sampling/logprob_difference_mean"].item() == pytest.approx(sum(map(abs, gaps)), rel=1e-5)
    mismatch = sum(math.exp(gap) - gap - 1 for gap in gaps)
    assert sums["sampling/mismatch_kl"].item() == pytest.approx(mismatch, rel=1e-5)
    outside = sum(math.exp(gap) > 1.2 for gap in gaps)
    assert sums["sampling/importance_ratio_outside"].item() == outside == 1
    assert sums["entropy"].item() == pytest.approx(sum(ENTROPY[token] for token in USED))
    assert sums["kl"].item() == pytest.approx(sum(kl(config, token) for token in USED), rel=1e-5)


def test_sft_loss_is_torch_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 9, generator=generator)
    labels = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    logprobs = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    expected = torch.nn.functional.cross_entropy(logits[USED], labels[USED], reduction="sum")
    loss, _ = sft_loss(predictions(logprobs), micro_batch(weights_T=None))
    torch.testing.assert_close(loss, expected)
