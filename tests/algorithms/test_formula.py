import pytest

from algorithms.formula import doubts, loss_line
from configs.schema import RunConfig


def config(algorithm: str, settings: dict[str, object]) -> RunConfig:
    has_teacher = algorithm == "gkd" or "teacher_kl_coef" in settings
    teacher = {"teacher_model": "t"} if has_teacher else {}
    return RunConfig.model_validate(
        {
            "algorithm": algorithm,
            "model": {"model": "m", **teacher},
            "data": {"dataset": "d"},
            "rewards": [{"function": "r"}],
            algorithm: settings,
        }
    )


def line(algorithm: str = "grpo", **settings: object) -> str:
    return loss_line(config(algorithm, settings))


def test_the_default_loss_is_spelled_out_with_its_numbers() -> None:
    assert line() == (
        "1/N_tokens(generation) Σ_i Σ_t [ min(w_t, 2) · (-min(r A, clip(r, 0.8, 1.2) A)) ],  r = π/π_old,  "
        "A = (R - mean_group) / (std_group + 1e-4)"
    )


def test_losses_on_the_load_of_experts_are_told() -> None:
    loss = config("sft", {})
    for settings, words in (
        ({"moe_aux_loss_coeff": 0.01}, ",  plus Σ_layers [ 0.01 E Σ_i f_i P_i ] over the step's tokens"),
        (
            {"moe_z_loss_coeff": 1e-3},
            ",  plus Σ_layers [ 0.001 mean_t logsumexp(z_t)² ] over the step's tokens",
        ),
    ):
        trainer = loss.trainer.model_copy(update=settings)
        assert loss_line(loss.model_copy(update={"trainer": trainer})) == loss_line(loss) + words


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
        ({"teacher_kl_coef": 0.5}, "(std_group + 1e-4) + 0.5 log π_T/π_old"),
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
    (said,) = doubts(config("grpo", settings), lora_dropout=0.0)
    assert words in said


@pytest.mark.parametrize("algorithm", ["grpo", "gkd"])
def test_dropout_is_doubtful_where_log_probabilities_are_compared(algorithm: str) -> None:
    (said,) = doubts(config(algorithm, {}), lora_dropout=0.05)
    assert said.startswith(
        "tuner.lora_dropout: 0.05 makes log-probabilities random in the trained pass alone"
    )
    assert list(doubts(config("sft", {}), lora_dropout=0.05)) == []


def test_the_defaults_raise_no_doubts() -> None:
    assert list(doubts(config("grpo", {}), lora_dropout=0.0)) == []


def test_the_losses_of_the_other_algorithms_are_spelled_out_too() -> None:
    mean = "1/N_tokens(step) Σ_i Σ_t"
    assert line("sft") == f"{mean} [ -log π ]"
    whole = "T, S = softmax(logits / 1) over the whole vocabulary"
    assert line("gkd", beta=0) == f"{mean} [ KL(T‖S) ],  {whole}"
    assert line("gkd", beta=1) == f"{mean} [ KL(S‖T) ],  {whole}"
    assert line(
        "gkd",
        beta=0.25,
        sft_alpha=0.1,
        temperature=0.9,
        loss_temperature="same",
        gkd_logits_topk=20,
    ) == (
        f"{mean} [ 0.25 KL(T‖M) + 0.75 KL(S‖M) + 0.1 d (-log π) ],  M = 0.25 T + 0.75 S,  d = 1 on completions "
        "of the dataset, else 0,  T, S = softmax(logits / 0.9) over T's 20 likeliest tokens"
    )
    tail = line("gkd", gkd_logits_topk=20, gkd_topk_tail=True)
    assert tail.endswith("over T's 20 likeliest tokens, all others as one more")
