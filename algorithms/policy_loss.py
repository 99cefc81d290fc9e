"""The policy-gradient losses of GRPO and its relatives, as sums over tokens."""

from dataclasses import dataclass

import torch

from algorithms.corrections import Metrics, off_policy_mask, sampler_weights
from algorithms.data import MicroBatch
from algorithms.roles import Predictions, TokenLoss
from algorithms.sequences import Sequences, loss_weights, masked, row
from configs.grpo import GRPOConfig

CISPO_CAP = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """A micro-batch as tensors [T]: zero off the loss mask, where padding is."""

    mask_T: torch.Tensor
    advantages_T: torch.Tensor
    logprobs_T: torch.Tensor
    engine_T: torch.Tensor
    log_ratio_T: torch.Tensor
    """log(policy / old policy); without old log-probabilities zero, with the policy's gradient."""
    sampled_T: torch.Tensor
    """log(old policy / what was sampled from)."""
    sequences: Sequences


def policy_loss(settings: GRPOConfig) -> TokenLoss:
    """The loss of the settings: of each token

        weight * (w * m * term + beta * KL - entropy_coef * entropy)

    with w from sampler_weights, m from the masks, `term` from `policy_term`. The KL term and the bonus are
    not weighted by w, as in TRL. Sources and names of other projects: docs/algorithms.md.
    """

    def loss(predictions: Predictions, micro: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        tokens = _tokens(predictions, micro)
        term_T, metrics = policy_term(tokens.log_ratio_T, tokens, settings)
        weights_T, sampling = sampler_weights(tokens.sampled_T, tokens.sequences, settings)
        per_token_T = term_T * weights_T
        if settings.off_policy_mask_threshold is not None:
            kept_T = off_policy_mask(
                tokens.logprobs_T.detach(),
                tokens.engine_T,
                tokens.advantages_T,
                tokens.sequences,
                settings.off_policy_mask_threshold,
            )
            per_token_T = per_token_T * kept_T
            metrics["sampling/off_policy_masked"] = 1 - kept_T
        if micro.policy_mask_T is not None:
            per_token_T = per_token_T * row(micro.policy_mask_T, per_token_T)
        if micro.ref_logprobs_T is not None:
            kl_T = _kl(tokens, row(micro.ref_logprobs_T, tokens.mask_T), settings)
            metrics["kl"] = kl_T
            if not settings.kl_in_reward:
                per_token_T = per_token_T + settings.beta * kl_T
        entropy_T = masked(predictions.entropy_T, tokens.mask_T)
        metrics["entropy"] = entropy_T
        if settings.entropy_coef > 0:
            per_token_T = per_token_T - settings.entropy_coef * entropy_T
        sums = {
            name: (each_T.detach() * tokens.mask_T).sum() for name, each_T in (metrics | sampling).items()
        }
        return (per_token_T * loss_weights(micro, tokens.mask_T)).sum(), sums

    return loss


def policy_term(
    log_ratio_T: torch.Tensor, tokens: _Tokens, settings: GRPOConfig
) -> tuple[torch.Tensor, Metrics]:
    """The term of each token whose gradient improves the policy, and metrics of its clipping.

    With r the ratio at the level that is asked for and A the advantage:
    clipped: -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A); cispo: -min(r, cap) A log p, with
    no gradient through r; sapo: -4/tau sigmoid(tau (r - 1)) A.
    """
    ratio_T = torch.exp(_at_level(log_ratio_T, tokens, settings))
    advantages_T = tokens.advantages_T
    if settings.loss_type == "cispo":
        cap = CISPO_CAP if settings.epsilon_high is None else settings.epsilon_high
        term_T = -ratio_T.detach().clamp(max=cap) * advantages_T * tokens.logprobs_T
        return term_T, {"cispo_clip_ratio": (ratio_T > cap).to(ratio_T.dtype)}
    if settings.loss_type == "sapo":
        positive, negative = settings.sapo_temperature_pos, settings.sapo_temperature_neg
        tau_T = torch.where(advantages_T > 0, positive, negative)
        return -4 / tau_T * torch.sigmoid(tau_T * (ratio_T - 1)) * advantages_T, {}
    low = 1 - settings.epsilon
    high = 1 + (settings.epsilon if settings.epsilon_high is None else settings.epsilon_high)
    open_T = ratio_T if settings.delta is None else ratio_T.clamp(max=settings.delta)
    term_T = -torch.minimum(open_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
    return term_T, {
        "clip_ratio/low_mean": ((ratio_T < low) & (advantages_T < 0)).to(ratio_T.dtype),
        "clip_ratio/high_mean": ((ratio_T > high) & (advantages_T > 0)).to(ratio_T.dtype),
    }


def _at_level(log_ratio_T: torch.Tensor, tokens: _Tokens, settings: GRPOConfig) -> torch.Tensor:
    if settings.importance_sampling_level == "token":
        return log_ratio_T
    mean_T = tokens.sequences.mean(log_ratio_T)
    if settings.importance_sampling_level == "sequence":
        return mean_T
    return masked(tokens.logprobs_T - tokens.logprobs_T.detach(), tokens.mask_T) + mean_T.detach()


def _kl(tokens: _Tokens, reference_T: torch.Tensor, settings: GRPOConfig) -> torch.Tensor:
    """KL(policy || reference) of each token, estimated from it alone. Source: Schulman 2020."""
    log_ratio_T = masked(tokens.logprobs_T - reference_T, tokens.mask_T)
    match settings.kl_estimator:
        case "k1":
            kl_T = log_ratio_T
        case "k2":
            kl_T = log_ratio_T.square() / 2
        case "k3":
            kl_T = torch.exp(-log_ratio_T) + log_ratio_T - 1
    return kl_T * torch.exp(tokens.log_ratio_T) if settings.use_bias_correction_kl else kl_T


def _tokens(predictions: Predictions, micro: MicroBatch) -> _Tokens:
    logprobs_T = predictions.logprobs_T
    mask_T = row(micro.loss_mask_T, logprobs_T)
    engine_T = row(micro.logprobs_T, logprobs_T)
    old_T = logprobs_T.detach()
    if micro.old_logprobs_T is not None:
        old_T = row(micro.old_logprobs_T, logprobs_T)
    return _Tokens(
        mask_T=mask_T,
        advantages_T=row(micro.advantages_T, logprobs_T),
        logprobs_T=masked(logprobs_T, mask_T),
        engine_T=masked(engine_T, mask_T),
        log_ratio_T=masked(logprobs_T - old_T, mask_T),
        sampled_T=masked(old_T - engine_T, mask_T),
        sequences=Sequences(micro, mask_T),
    )
