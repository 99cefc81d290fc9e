"""The policy losses against TRL's own code, where both mean the same: values and gradients of a padded batch."""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.data import TrainSample, float_row, int_row
from algorithms.experience import scaling
from algorithms.packing import pack
from algorithms.policy_loss import policy_loss
from algorithms.roles import Predictions
from configs.grpo import GRPOConfig
from configs.schema import TrainerConfig

LENGTHS = (5, 2, 7, 1)
LONGEST = max(LENGTHS)


@pytest.fixture(scope="module")
def grpo_trainer() -> Any:
    with warnings.catch_warnings():
        # About the version of vLLM, which is not used here.
        warnings.simplefilter("ignore")
        from trl.trainer.grpo_trainer import GRPOTrainer
    return GRPOTrainer


def batch() -> dict[str, torch.Tensor]:
    """Rows [B, T] of four completions: what policy, old policy, engine and reference say; entropies."""
    generator = torch.Generator().manual_seed(1)

    def near(rows: torch.Tensor, spread: float) -> torch.Tensor:
        return rows + spread * torch.randn(rows.shape, generator=generator)

    current = -2 * torch.rand(len(LENGTHS), LONGEST, generator=generator)
    return {
        "current": current,
        "old": near(current, 0.3),
        "engine": near(current, 0.4),
        "reference": near(current, 0.5),
        "entropy": torch.rand(current.shape, generator=generator),
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.5]),
        "mask": (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]).long(),
    }


def sampler_ratio(rows: dict[str, torch.Tensor], settings: GRPOConfig) -> torch.Tensor:
    """What TRL computes when completions come, for the modes in which it means the same."""
    log_ratio = (rows["old"] - rows["engine"]) * rows["mask"]
    ratio = log_ratio.exp()
    if settings.importance_sampling_mode.startswith("sequence"):
        ratio = log_ratio.sum(dim=1, keepdim=True).exp()
    cap = settings.importance_sampling_cap
    if settings.importance_sampling_mode.endswith("truncate"):
        return ratio.clamp(max=cap)
    return torch.where(ratio > cap, 0.0, ratio)


def of_trl(
    grpo_trainer: Any, rows: dict[str, torch.Tensor], settings: GRPOConfig
) -> tuple[float, torch.Tensor]:
    """Loss and gradient of TRL's _compute_loss for these log-probabilities."""
    logprobs = rows["current"].clone().requires_grad_()
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (logprobs, rows["entropy"], None),
        get_off_policy_mask=grpo_trainer.get_off_policy_mask,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=settings.off_policy_mask_threshold,
        importance_sampling_level=settings.importance_sampling_level,
        beta=settings.beta,
        loss_type=settings.loss_type,
        epsilon_low=settings.epsilon,
        epsilon_high=high,
        use_vllm=True,
        vllm_importance_sampling_correction=settings.importance_sampling_correction,
        max_completion_length=settings.max_completion_length,
        current_gradient_accumulation_steps=1,
        model=torch.nn.Identity(),
        args=SimpleNamespace(
            use_bias_correction_kl=settings.use_bias_correction_kl,
            delta=settings.delta,
            sapo_temperature_pos=settings.sapo_temperature_pos,
            sapo_temperature_neg=settings.sapo_temperature_neg,
            steps_per_generation=1,
        ),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda values: values, reduce=lambda values, reduction: values
        ),
        _entropy_bonus_enabled=settings.entropy_coef > 0,
        use_adaptive_entropy=False,
        entropy_coef=settings.entropy_coef,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    trainer.accelerator.sync_gradients = True
    nothing = torch.zeros(len(LENGTHS), 0, dtype=torch.long)
    loss = grpo_trainer._compute_loss(
        trainer,
        trainer.model,
        {
            "prompt_ids": nothing,
            "prompt_mask": nothing,
            "completion_ids": rows["mask"],
            "completion_mask": rows["mask"],
            "advantages": rows["advantages"],
            "old_per_token_logps": rows["old"],
            "sampling_per_token_logps": rows["engine"],
            "ref_per_token_logps": rows["reference"],
            "importance_sampling_ratio": sampler_ratio(rows, settings),
            "num_items_in_batch": rows["mask"].sum(),
        },
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient


def of_ours(rows: dict[str, torch.Tensor], settings: GRPOConfig) -> tuple[float, torch.Tensor]:
    """The same of all completions in one packed row."""

    def row(name: str, number: int) -> Any:
        # After one token of prompt.
        return float_row(np.append(0.0, rows[name][number, : LENGTHS[number]].numpy()))

    samples = [
        TrainSample(
            tokens=int_row(range(length + 1)),
            loss_mask=int_row([0] + [1] * length),
            advantages=float_row([0.0] + [float(rows["advantages"][number])] * length),
            logprobs=row("engine", number),
            version=0,
            old_logprobs=row("old", number),
            ref_logprobs=row("reference", number) if settings.beta > 0 else None,
        )
        for number, length in enumerate(LENGTHS)
    ]
    scale = scaling(samples, sum(LENGTHS), settings)
    (micro,) = pack(samples, TrainerConfig(), scale).ranks[0]
    logprobs = rows["current"].clone().requires_grad_()
    packed_T, entropy_T = torch.zeros(len(micro.tokens_T)), torch.zeros(len(micro.tokens_T))
    for place, number in enumerate(micro.samples_S):
        start, end = int(micro.starts_S[place]), int(micro.starts_S[place + 1]) - 1
        packed_T = torch.cat([packed_T[:start], logprobs[number, : end - start], packed_T[end:]])
        entropy_T[start:end] = rows["entropy"][number, : end - start]
    loss, _ = policy_loss(settings)(Predictions(logprobs_T=packed_T, entropy_T=entropy_T), micro)
    loss = loss / scale.denominator
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo"},
        {"loss_type": "bnpo", "epsilon_high": 0.28},
        {"loss_type": "grpo", "importance_sampling_correction": False},
        {"loss_type": "dr_grpo", "max_completion_length": 9},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"loss_type": "sapo", "sapo_temperature_neg": 1.7},
        {"loss_type": "dapo", "delta": 1.3},
        {"loss_type": "grpo", "beta": 0.1},
        {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
        {"loss_type": "dapo", "importance_sampling_mode": "token_mask", "importance_sampling_cap": 1.2},
        {
            "loss_type": "dapo",
            "importance_sampling_mode": "sequence_mask",
            "importance_sampling_ratio": "product",
        },
        {
            "loss_type": "grpo",
            "importance_sampling_mode": "sequence_truncate",
            "importance_sampling_ratio": "product",
            "importance_sampling_cap": 1.1,
        },
        {"loss_type": "dapo", "off_policy_mask_threshold": 0.05},
        {"loss_type": "dapo", "entropy_coef": 0.1},
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_trl(settings: dict[str, Any], grpo_trainer: Any) -> None:
    config = GRPOConfig.model_validate(settings)
    rows = batch()
    want, want_gradient = of_trl(grpo_trainer, rows, config)
    got, gradient = of_ours(rows, config)
    assert got == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-7)
