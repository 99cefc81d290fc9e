import pytest

from algorithms.formula import doubts, loss_line
from configs.grpo import GRPOConfig


def line(**settings: object) -> str:
    return loss_line(GRPOConfig.model_validate(settings))


def test_the_default_loss_is_spelled_out_with_its_numbers() -> None:
    assert line() == (
        "1/N_tokens(generation) Σ_i Σ_t [ min(w_t, 2) · (-min(r A, clip(r, 0.8, 1.2) A)) ],  r = π/π_old,  "
        "A = (R - mean_group) / (std_group + 1e-4)"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "grpo"}, "1/N_sequences Σ_i 1/L_i Σ_t"),
        ({"loss_type": "dr_grpo", "max_completion_length": 77}, "1/(77 N_sequences) Σ_i Σ_t"),
        ({"loss_type": "cispo"}, "-sg(min(r, 5)) A log π"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 2.0}, "τ = 1 for A > 0, else 2"),
        ({"delta": 3.0, "epsilon_high": 0.28}, "-min(min(r, 3) A, clip(r, 0.8, 1.28) A)"),
        ({"beta": 0.04, "use_bias_correction_kl": True}, "+ 0.04 r KL_k3(π‖π_ref)"),
        ({"beta": 0.04, "kl_in_reward": True}, "A = ((R - 0.04 Σ_t log π_old/π_ref) - mean_group)"),
        ({"entropy_coef": 0.01}, "- 0.01 H(π)"),
        ({"importance_sampling_level": "sequence"}, "r = exp(mean_t log π/π_old)"),
        (
            {"importance_sampling_mode": "token_mask", "importance_sampling_min": 0.5},
            "w_t 1[0.5 ≤ w_t ≤ 2]",
        ),
        ({"advantage_estimator": "rloo"}, "A = (R - mean of the others)"),
    ],
)
def test_what_is_set_is_in_the_line(settings: dict[str, object], words: str) -> None:
    assert words in line(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "caps the ratio itself at 0.28"),
        (
            {
                "importance_sampling_mode": "sequence_mask",
                "importance_sampling_ratio": "product",
                "max_completion_length": 4096,
            },
            "is 60.1, above 2",
        ),
        ({"importance_sampling_mode": "sequence_mask"}, "hardly ever reaches 2"),
        ({"top_p": 0.9}, "not the distribution that is trained"),
        ({"beta": 0.1, "kl_estimator": "k1"}, "no gradient in expectation"),
        ({"importance_sampling_level": "sequence"}, "clips no mean over a sequence"),
        ({"max_lag": 1, "importance_sampling_correction": False}, "nothing makes up for the older weights"),
    ],
)
def test_doubtful_settings_are_named(settings: dict[str, object], words: str) -> None:
    (said,) = doubts(GRPOConfig.model_validate(settings), 1)
    assert words in said


def test_the_defaults_raise_no_doubts() -> None:
    assert list(doubts(GRPOConfig(), 1)) == []
