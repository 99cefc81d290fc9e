"""What makes up for samples that are not quite the policy's: other arithmetic in the engine, older weights."""

import torch

from algorithms.sequences import Sequences
from configs.grpo import GRPOConfig

Metrics = dict[str, torch.Tensor]


def sampler_weights(
    log_ratio_T: torch.Tensor, sequences: Sequences, settings: GRPOConfig
) -> tuple[torch.Tensor, Metrics]:
    """What each token's policy term counts, and metrics to be summed over the loss tokens.

    `log_ratio_T` is log(old policy / what the engine sampled from), zero off the loss mask. The weights are 1
    without the correction; the metrics are the same. Sources: Yao et al. 2025 (truncated importance
    sampling), Ling team 2025 (IcePop); the names of modes are TRL's.
    """
    cap, low = settings.importance_sampling_cap, settings.importance_sampling_min or 0.0
    mode = settings.importance_sampling_mode
    token_T = torch.exp(log_ratio_T)
    is_product = settings.importance_sampling_ratio == "product"
    sequence_T = torch.exp(sequences.total(log_ratio_T) if is_product else sequences.mean(log_ratio_T))
    ratio_T = token_T if mode.startswith("token") else sequence_T
    outside_T = (ratio_T > cap) | (ratio_T < low)
    match mode:
        case "token_truncate" | "sequence_truncate":
            weights_T = ratio_T.clamp(max=cap)
        case "token_mask":
            weights_T = torch.where(outside_T, 0.0, token_T)
        case "sequence_mask":
            kept_T = sequence_T if is_product else token_T.clamp(max=cap)
            weights_T = torch.where(outside_T, 0.0, kept_T)
    if not settings.importance_sampling_correction:
        weights_T = torch.ones_like(log_ratio_T)
    return weights_T, {
        # k3 with the roles exchanged: an estimate of KL(engine || trainer) on the engine's own samples.
        "sampling/mismatch_kl": token_T - log_ratio_T - 1,
        "sampling/logprob_difference_mean": log_ratio_T.abs(),
        "sampling/importance_ratio_mean": ratio_T,
        "sampling/importance_ratio_outside": outside_T.to(log_ratio_T.dtype),
    }


def off_policy_mask(
    current_T: torch.Tensor,
    engine_T: torch.Tensor,
    advantages_T: torch.Tensor,
    sequences: Sequences,
    threshold: float,
) -> torch.Tensor:
    """1 for tokens of sequences to keep, 0 for those that were bad and have become unlikely.

    A sequence goes when its advantage is negative and the mean of log(sampled from / policy) is above
    `threshold`. Source: DeepSeek-AI 2025 (DeepSeek-V3.2), off-policy sequence masking.
    """
    drift_T = sequences.mean(engine_T - current_T)
    return 1 - ((drift_T > threshold) & (advantages_T < 0)).to(current_T.dtype)
