"""Settings of GRPO that contradict each other are refused by name."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.schema import RunConfig


def config(tuner: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"model": "m"},
            "data": {"dataset": "d"},
            "grpo": settings,
            "tuner": tuner or {},
            "rewards": [{"function": "r"}],
        }
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps_per_generation": 3}, "steps_per_generation: 3 does not divide grpo.prompts_per_step 16"),
        (
            {"advantage_estimator": "gdpo", "scale_rewards": "batch"},
            "scale_rewards: gdpo has a scale of its own",
        ),
        ({"loss_type": "sapo", "delta": 2.0}, "delta: sapo does not clip"),
        ({"delta": 1.1}, r"delta: 1.1 has to be above 1 \+ epsilon_high = 1.2"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "use sequence_token"),
        ({"kl_in_reward": True}, "kl_in_reward: is not used while grpo.beta is 0"),
        ({"sync_ref_model": True}, "sync_ref_model: is not used while grpo.beta is 0"),
        ({"beta": 0.1, "kl_in_reward": True, "use_bias_correction_kl": True}, "use_bias_correction_kl"),
        ({"importance_sampling_min": 0.5}, "token_truncate has no lower bound"),
        (
            {"importance_sampling_mode": "token_mask", "importance_sampling_min": 3.0},
            "3.0 is not below importance_sampling_cap",
        ),
        ({"soft_overlong_cache": 512}, "soft_overlong_cache: has to be below grpo.max_completion_length"),
        ({"dynamic_sample": True, "filter_zero_variance": False}, "dynamic_sample replaces these groups"),
        (
            {"beta": 0.1, "kl_in_reward": True, "advantage_estimator": "gdpo"},
            "kl_in_reward: gdpo compares the values of each reward function by themselves",
        ),
        (
            {"beta": 0.1, "kl_in_reward": True, "mask_truncated_completions": True},
            "kl_in_reward: completions that mask_truncated_completions masks have no KL",
        ),
        (
            {"dynamic_sample": True, "advantage_estimator": "reinforce_plus_plus"},
            "dynamic_sample: replaces groups whose rewards are equal, which reinforce_plus_plus trains on",
        ),
        ({"eval_num_generations": 65}, r"max_num_seqs: 64 is less than grpo.eval_num_generations 65"),
        ({"beta": 0.1, "sync_ref_model": True, "tuner": {"tuner_type": "lora"}}, "moves a whole reference"),
    ],
    ids=str,
)
def test_contradictions_name_the_option(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**settings)


def test_the_optimizer_steps_of_a_run_count_iterations() -> None:
    run = config(steps_per_generation=2, num_iterations=3)
    assert run.optimizer_steps == run.max_steps * 6
