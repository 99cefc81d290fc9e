"""Losses, layouts and ways to pack of the tests of the loss as a contract."""

from typing import Any

from configs.schema import TrainerConfig

LOSSES: dict[str, dict[str, Any]] = {
    "dapo": {"epsilon_high": 0.28},
    "grpo, kl": {"loss_type": "grpo", "beta": 0.1},
    "dr_grpo, k2, delta": {"loss_type": "dr_grpo", "beta": 0.1, "kl_estimator": "k2", "delta": 1.3},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05},
    "gspo-token, geometric mask": {
        "importance_sampling_level": "sequence_token",
        "importance_sampling_mode": "sequence_mask",
        "importance_sampling_min": 0.8,
        "importance_sampling_cap": 1.2,
    },
    "cispo, product": {
        "loss_type": "cispo",
        "importance_sampling_mode": "sequence_truncate",
        "importance_sampling_ratio": "product",
    },
    "sapo, entropy, off-policy mask": {
        "loss_type": "sapo",
        "entropy_coef": 0.05,
        "off_policy_mask_threshold": 0.05,
    },
    "distillation": {"teacher_kl_coef": 0.5},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2": {"data_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "one, recompute": {"recompute_granularity": "full"},
    "tp2-sp, recompute": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "recompute_granularity": "full",
        "recompute_num_layers": 2,
    },
    "one, selective": {"recompute_granularity": "selective"},
    "cp2": {"context_parallel_size": 2},
    "cp2-tp2-sp": {
        "context_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
    },
    "cp2-pp2": {"context_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "cp2-dp2": {"context_parallel_size": 2, "data_parallel_size": 2},
    "cp4, recompute": {"context_parallel_size": 4, "recompute_granularity": "full"},
}


PACKINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "1": ({"micro_batch_size": 1}, False),
    "2": ({"micro_batch_size": 2}, False),
    "8": ({"micro_batch_size": 8}, False),
    "16 tokens": ({"micro_batch_tokens": 16}, False),
    "40 tokens, other order": ({"micro_batch_tokens": 40}, True),
    "padded 2, other order": ({"micro_batch_size": 2, "packing": False}, True),
}
"""Settings of the trainer, and whether the samples come in the other order."""


def world_size(layout: str) -> int:
    """Processes that the layout takes."""
    return TrainerConfig.model_validate(LAYOUTS[layout]).world_size


def losses_of(layout: str) -> tuple[str, ...]:
    """What is measured under the layout: with four processes on two cores only what it might change."""
    if world_size(layout) <= 2:
        return ("sft", *LOSSES)
    return ("gspo-token, geometric mask", "sapo, entropy, off-policy mask")


def packings_of(layout: str) -> tuple[str, ...]:
    """The same for ways to pack."""
    return tuple(PACKINGS) if world_size(layout) <= 2 else ("1", "40 tokens, other order")
