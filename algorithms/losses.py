"""Losses as sums over tokens. The trainer divides once, by the loss tokens of the global batch."""

from typing import Any

import torch

from algorithms.data import MicroBatch
from algorithms.roles import TokenLoss
from configs.grpo import GRPOConfig
from configs.schema import RunConfig


def loss_of(config: RunConfig) -> TokenLoss:
    """The loss that the run trains with."""
    return sft_loss if config.algorithm == "sft" else grpo_loss(config.grpo)


def sft_loss(logprobs_T: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy: minus the sum of the log-probabilities of the loss tokens."""
    return -(logprobs_T * _row(micro.loss_mask_T, logprobs_T)).sum(), {}


def grpo_loss(settings: GRPOConfig) -> TokenLoss:
    """The clipped token-level policy loss.

    Per token: -w min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta k3, where r is policy over old
    policy (the trainer's own, before the first optimizer step on the batch), w = min(old / engine, cap)
    corrects for the engine's different arithmetic, and k3 = exp(d) - d - 1 with d = log ref - log policy.
    The KL term is not weighted by w, as in TRL. Sources: Shao et al. 2024 (GRPO), Yu et al. 2025 (DAPO: token
    mean, epsilon_high), Yao et al. 2025 (truncated importance sampling), Schulman 2020 (k3).
    """
    low = 1 - settings.epsilon
    high = 1 + (settings.epsilon if settings.epsilon_high is None else settings.epsilon_high)

    def loss(logprobs_T: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask_T = _row(micro.loss_mask_T, logprobs_T)
        advantages_T = _row(micro.advantages_T, logprobs_T)
        engine_T = _row(micro.logprobs_T, logprobs_T)
        current_T = logprobs_T.detach()
        old_T = current_T if micro.old_logprobs_T is None else _row(micro.old_logprobs_T, logprobs_T)
        ratio_T = torch.exp(_masked(logprobs_T - old_T, mask_T))
        per_token_T = -torch.minimum(ratio_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
        mismatch_T = _masked(old_T - engine_T, mask_T)
        weight_T = torch.exp(mismatch_T)
        if settings.importance_sampling_correction:
            per_token_T = per_token_T * weight_T.clamp(max=settings.importance_sampling_cap)
        sums = {
            "clip_ratio/low_mean": ((ratio_T < low) & (advantages_T < 0)) * mask_T,
            "clip_ratio/high_mean": ((ratio_T > high) & (advantages_T > 0)) * mask_T,
            # k3 again: an estimate of KL(engine || trainer) on the engine's own samples.
            "sampling/mismatch_kl": (weight_T - mismatch_T - 1) * mask_T,
            "sampling/logprob_difference_mean": mismatch_T.abs() * mask_T,
            "sampling/importance_weight_capped": (weight_T > settings.importance_sampling_cap) * mask_T,
            "entropy_estimate": -current_T * mask_T,
        }
        if micro.ref_logprobs_T is not None:
            delta_T = _masked(_row(micro.ref_logprobs_T, logprobs_T) - logprobs_T, mask_T)
            kl_T = torch.exp(delta_T) - delta_T - 1
            per_token_T = per_token_T + settings.beta * kl_T
            sums["kl"] = kl_T.detach() * mask_T
        return (per_token_T * mask_T).sum(), {name: row_T.sum() for name, row_T in sums.items()}

    return loss


def _row(values: Any, like: torch.Tensor) -> torch.Tensor:
    """The numpy row as a tensor of the log-probabilities' type, on their device."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _masked(difference_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Zero off the mask before any exp: rows there hold padding, and inf times a zero mask is NaN."""
    return torch.where(mask_T > 0, difference_T, torch.zeros_like(difference_T))
