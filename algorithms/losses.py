"""Losses as sums over tokens. The trainer divides once, by a count over the global batch."""

import torch

from algorithms.data import MicroBatch
from algorithms.policy_loss import policy_loss
from algorithms.roles import Predictions, TokenLoss
from algorithms.sequences import row
from configs.schema import RunConfig


def loss_of(config: RunConfig) -> TokenLoss:
    """The loss that the run trains with."""
    return sft_loss if config.algorithm == "sft" else policy_loss(config.grpo)


def sft_loss(predictions: Predictions, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy: minus the sum of the log-probabilities of the loss tokens."""
    mask_T = row(micro.loss_mask_T, predictions.logprobs_T)
    weights_T = mask_T if micro.weights_T is None else row(micro.weights_T, mask_T)
    return -(predictions.logprobs_T * weights_T).sum(), {
        "entropy": (predictions.entropy_T.detach() * mask_T).sum()
    }
