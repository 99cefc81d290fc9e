import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from algorithms.data import MicroBatch, float_row, int_row
from algorithms.losses import grpo_loss, sft_loss
from configs.grpo import GRPOConfig

CURRENT = [-0.5, -1.0, -2.0, -0.1, -3.0]
OLD = [-0.9, -1.0, -1.5, -0.4, -9.0]
ENGINE = [-0.8, -1.9, -1.4, -0.4, 50.0]  # the last is masked: it must not leak in as inf or NaN
REFERENCE = [-0.6, -1.2, -1.0, -0.1, -40.0]
ADVANTAGES = [1.5, -0.7, -0.7, 1.5, 100.0]
MASK = [1, 1, 1, 1, 0]


def micro_batch() -> MicroBatch:
    zeros = int_row([0] * 5)
    return MicroBatch(
        tokens_T=zeros,
        labels_T=zeros,
        positions_T=zeros,
        starts_S=int_row([0, 5]),
        loss_mask_T=int_row(MASK),
        advantages_T=float_row(ADVANTAGES),
        logprobs_T=float_row(ENGINE),
        old_logprobs_T=float_row(OLD),
        ref_logprobs_T=float_row(REFERENCE),
    )


def by_hand(low: float, high: float, beta: float, cap: float | None) -> float:
    total = 0.0
    for current, old, engine, reference, advantage, used in zip(
        CURRENT, OLD, ENGINE, REFERENCE, ADVANTAGES, MASK, strict=True
    ):
        if not used:
            continue
        ratio = math.exp(current - old)
        clipped = min(max(ratio, 1 - low), 1 + high)
        term = -min(ratio * advantage, clipped * advantage)
        if cap is not None:
            term *= min(math.exp(old - engine), cap)
        delta = reference - current
        total += term + beta * (math.exp(delta) - delta - 1)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("cap", [None, 2.0, 0.5])
@pytest.mark.parametrize("high", [None, 0.28])
def test_grpo_loss_equals_the_formula_written_out(beta: float, cap: float | None, high: float | None) -> None:
    settings = GRPOConfig(
        beta=beta,
        epsilon_high=high,
        importance_sampling_correction=cap is not None,
        importance_sampling_cap=cap or 2.0,
    )
    loss, _ = grpo_loss(settings)(torch.tensor(CURRENT), micro_batch())
    assert loss.item() == pytest.approx(by_hand(0.2, 0.2 if high is None else high, beta, cap), rel=1e-5)


def test_gradient_is_zero_where_clipped_or_masked_and_follows_the_ratio_elsewhere() -> None:
    logprobs = torch.tensor(CURRENT, requires_grad=True)
    settings = GRPOConfig(importance_sampling_correction=False)
    loss, _ = grpo_loss(settings)(logprobs, micro_batch())
    loss.backward()
    assert logprobs.grad is not None
    ratios = np.exp(np.subtract(CURRENT, OLD))
    # Token 0 and 3: ratio above 1.2 with a positive advantage; token 2: below 0.8 with a negative one.
    expected = [0.0, -ratios[1] * ADVANTAGES[1], 0.0, 0.0, 0.0]
    np.testing.assert_allclose(logprobs.grad, expected, rtol=1e-5, atol=1e-12)


def test_without_old_logprobs_the_ratio_is_one_but_has_a_gradient() -> None:
    logprobs = torch.tensor(CURRENT, requires_grad=True)
    settings = GRPOConfig(importance_sampling_correction=False)
    loss, sums = grpo_loss(settings)(logprobs, replace(micro_batch(), old_logprobs_T=None))
    loss.backward()
    assert loss.item() == pytest.approx(-sum(np.multiply(ADVANTAGES, MASK)), rel=1e-6)
    np.testing.assert_allclose(logprobs.grad, -np.multiply(ADVANTAGES, MASK), rtol=1e-6)
    assert sums["clip_ratio/high_mean"].item() == 0


def test_metrics_are_sums_over_loss_tokens() -> None:
    _, sums = grpo_loss(GRPOConfig(beta=0.1))(torch.tensor(CURRENT), micro_batch())
    weights = [math.exp(old - engine) for old, engine in zip(OLD[:4], ENGINE[:4], strict=True)]
    gaps = [old - engine for old, engine in zip(OLD[:4], ENGINE[:4], strict=True)]
    assert sums["clip_ratio/high_mean"].item() == 2
    assert sums["clip_ratio/low_mean"].item() == 1
    assert sums["sampling/logprob_difference_mean"].item() == pytest.approx(sum(map(abs, gaps)), rel=1e-5)
    kl = sum(weight - gap - 1 for weight, gap in zip(weights, gaps, strict=True))
    assert sums["sampling/mismatch_kl"].item() == pytest.approx(kl, rel=1e-5)
    assert sums["sampling/importance_weight_capped"].item() == sum(weight > 2 for weight in weights)


def test_sft_loss_is_torch_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator)
    labels = torch.tensor([1, 2, 3, 4, 5])
    logprobs = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    expected = torch.nn.functional.cross_entropy(logits[:4], labels[:4], reduction="sum")
    loss, _ = sft_loss(logprobs, micro_batch())
    torch.testing.assert_close(loss, expected)
