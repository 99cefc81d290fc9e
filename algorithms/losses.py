"""Losses as sums over tokens. The trainer divides once, by a count over the global batch."""

import torch

from algorithms.data import MicroBatch
from algorithms.policy_loss import policy_loss
from algorithms.roles import Predictions, TokenLoss
from algorithms.sequences import loss_weights, row
from configs.gkd import GKDConfig
from configs.schema import RunConfig


def loss_of(config: RunConfig) -> TokenLoss:
    """The loss that the run trains with."""
    match config.algorithm:
        case "sft":
            return sft_loss
        case "gkd":
            return gkd_loss(config.gkd)
        case "grpo":
            return policy_loss(config.grpo)


def sft_loss(predictions: Predictions, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy: minus the sum of the log-probabilities of the loss tokens."""
    mask_T = row(micro.loss_mask_T, predictions.logprobs_T)
    return -(predictions.logprobs_T * loss_weights(micro, mask_T)).sum(), {
        "entropy": (predictions.entropy_T.detach() * mask_T).sum()
    }


def gkd_loss(settings: GKDConfig) -> TokenLoss:
    """The divergence from the teacher, and `sft_alpha` times cross-entropy where the advantage is 1.

    That is on completions of the dataset; on the student's own the advantage is 0. Source: Agarwal et al. 2024.
    """

    def loss(predictions: Predictions, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        divergence_T = predictions.divergence_T
        assert divergence_T is not None, "a run of gkd has a teacher"
        mask_T = row(micro.loss_mask_T, divergence_T)
        terms_T = divergence_T
        if settings.sft_alpha > 0:
            given_T = row(micro.advantages_T, mask_T)
            terms_T = terms_T - settings.sft_alpha * given_T * predictions.logprobs_T
        return (terms_T * loss_weights(micro, mask_T)).sum(), {
            "divergence": (divergence_T.detach() * mask_T).sum(),
            "cross_entropy": (-predictions.logprobs_T.detach() * mask_T).sum(),
            "entropy": (predictions.entropy_T.detach() * mask_T).sum(),
        }

    return loss
