"""A run's loss as one line of mathematics with its numbers, and settings that are likely to be mistakes."""

import math
from collections.abc import Iterator

from algorithms.policy_loss import CISPO_CAP
from configs.gkd import GKDConfig
from configs.grpo import GRPOConfig
from configs.schema import RunConfig

_DENOMINATORS = {
    "dapo": "1/N_tokens(generation) Σ_i Σ_t",
    "cispo": "1/N_tokens(generation) Σ_i Σ_t",
    "bnpo": "1/N_tokens(step) Σ_i Σ_t",
    "grpo": "1/N_sequences Σ_i 1/L_i Σ_t",
    "sapo": "1/N_sequences Σ_i 1/L_i Σ_t",
}


def loss_line(config: RunConfig) -> str:
    """What the trainer minimizes, for `bascule plan`.

    r is new over old policy, w old policy over what the engine sampled from, A the advantage. T and S are the
    teacher's and the student's distribution. f and P are experts' shares of tokens and mean scores, z a router's
    logits.
    """
    match config.algorithm:
        case "grpo":
            line = _grpo_line(config.grpo)
        case "gkd":
            line = _gkd_line(config.gkd)
        case "sft":
            line = f"{_DENOMINATORS['bnpo']} [ -log π ]"
    aux, z = config.trainer.moe_aux_loss_coeff, config.trainer.moe_z_loss_coeff
    terms = [f"{aux:g} E Σ_i f_i P_i"] * (aux > 0) + [f"{z:g} mean_t logsumexp(z_t)²"] * (z > 0)
    return f"{line},  plus Σ_layers [ {' + '.join(terms)} ] over the step's tokens" if terms else line


def _grpo_line(settings: GRPOConfig) -> str:
    if settings.loss_type == "dr_grpo":
        outer = f"1/({settings.max_completion_length} N_sequences) Σ_i Σ_t"
    else:
        outer = _DENOMINATORS[settings.loss_type]
    term = " · ".join([*_factors(settings), _policy_term(settings)])
    if settings.beta > 0 and not settings.kl_in_reward:
        ratio = " r" if settings.use_bias_correction_kl else ""
        term += f" + {settings.beta:g}{ratio} KL_{settings.kl_estimator}(π‖π_ref)"
    if settings.entropy_coef > 0:
        term += f" - {settings.entropy_coef:g} H(π)"
    return f"{outer} [ {term} ],  r = {_ratio(settings)},  A = {_advantage(settings)}{_taught(settings)}"


def _taught(settings: GRPOConfig) -> str:
    return f" + {settings.teacher_kl_coef:g} log π_T/π_old" if settings.teacher_kl_coef > 0 else ""


def _gkd_line(settings: GKDConfig) -> str:
    beta = settings.beta
    match beta:
        case 0:
            term, where = "KL(T‖S)", ""
        case 1:
            term, where = "KL(S‖T)", ""
        case _:
            term = f"{beta:g} KL(T‖M) + {1 - beta:g} KL(S‖M)"
            where = f",  M = {beta:g} T + {1 - beta:g} S"
    if settings.sft_alpha > 0:
        term += f" + {settings.sft_alpha:g} d (-log π)"
        where += ",  d = 1 on completions of the dataset, else 0"
    tokens = "the whole vocabulary"
    if settings.gkd_logits_topk is not None:
        tail = ", all others as one more" if settings.gkd_topk_tail else ""
        tokens = f"T's {settings.gkd_logits_topk} likeliest tokens{tail}"
    softmax = f"T, S = softmax(logits / {settings.divergence_temperature:g}) over {tokens}"
    return f"{_DENOMINATORS['bnpo']} [ {term} ]{where},  {softmax}"


def doubts(config: RunConfig, *, lora_dropout: float) -> Iterator[str]:
    """Settings that other projects' users are known to have got wrong; `lora_dropout` is that of the adapter
    that is trained, which may have its own."""
    if lora_dropout > 0 and config.algorithm != "sft":
        yield (
            f"tuner.lora_dropout: {lora_dropout:g} makes log-probabilities random in the trained pass alone, so "
            "they differ from all that is asked of the same weights; set it to 0"
        )
    if config.algorithm == "grpo":
        yield from _doubts_of_grpo(config.grpo, len(config.rewards))


def _doubts_of_grpo(settings: GRPOConfig, weights: int) -> Iterator[str]:
    if settings.loss_type == "cispo" and settings.epsilon_high is not None and settings.epsilon_high < 1:
        yield (
            f"grpo.epsilon_high: cispo caps the ratio itself at {settings.epsilon_high:g}, which weights nearly "
            f"every token by that; leave it out for {CISPO_CAP:g}"
        )
    mode, cap = settings.importance_sampling_mode, settings.importance_sampling_cap
    if mode.startswith("sequence") and settings.importance_sampling_correction:
        product = math.exp(settings.max_completion_length * 1e-3)
        if settings.importance_sampling_ratio == "product" and cap < product:
            yield (
                f"grpo.importance_sampling_cap: the product over {settings.max_completion_length} tokens that "
                f"are off by 0.001 each is {product:.3g}, above {cap:g}, which cuts or masks most"
            )
        if settings.importance_sampling_ratio == "geometric" and cap > 1.1:
            yield (
                f"grpo.importance_sampling_cap: a geometric mean of ratios hardly ever reaches {cap:g}; 1.01 with "
                "importance_sampling_min 0.99 is what others use"
            )
    if settings.top_p < 1 or settings.top_k > 0:
        yield "grpo.top_p, grpo.top_k: what is sampled is not the distribution that is trained"
    if settings.importance_sampling_level == "sequence" and settings.epsilon > 0.01:
        yield f"grpo.epsilon: {settings.epsilon:g} clips no mean over a sequence; GSPO's authors use 3e-4"
    if settings.kl_estimator == "k1" and settings.beta > 0 and not settings.kl_in_reward:
        yield "grpo.kl_estimator: k1 in the loss has no gradient in expectation on-policy; use k2 or k3"
    if settings.advantage_estimator == "gdpo" and weights < 2:
        yield "grpo.advantage_estimator: gdpo is for several reward functions"
    if settings.max_lag > 0 and not settings.importance_sampling_correction:
        yield "grpo.max_lag: without importance_sampling_correction nothing makes up for the older weights"


def _factors(settings: GRPOConfig) -> list[str]:
    factors: list[str] = []
    if settings.importance_sampling_correction:
        low = settings.importance_sampling_min or 0
        cap, mode = settings.importance_sampling_cap, settings.importance_sampling_mode
        ratio = "w_t" if mode.startswith("token") else f"w_{settings.importance_sampling_ratio}"
        match mode:
            case "token_truncate" | "sequence_truncate":
                factors.append(f"min({ratio}, {cap:g})")
            case "token_mask":
                factors.append(f"w_t 1[{low:g} ≤ w_t ≤ {cap:g}]")
            case "sequence_mask":
                own = "w_product" if settings.importance_sampling_ratio == "product" else f"min(w_t, {cap:g})"
                factors.append(f"{own} 1[{low:g} ≤ {ratio} ≤ {cap:g}]")
    if settings.off_policy_mask_threshold is not None:
        factors.append(f"1[A ≥ 0 or mean log(sampled/π) ≤ {settings.off_policy_mask_threshold:g}]")
    if settings.top_entropy_quantile < 1:
        factors.append(f"1[H in its top {settings.top_entropy_quantile:g}]")
    return factors


def _policy_term(settings: GRPOConfig) -> str:
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    if settings.loss_type == "cispo":
        cap = CISPO_CAP if settings.epsilon_high is None else settings.epsilon_high
        return f"(-sg(min(r, {cap:g})) A log π)"
    if settings.loss_type == "sapo":
        return (
            f"(-4/τ sigmoid(τ(r-1)) A), τ = {settings.sapo_temperature_pos:g} for A > 0, else "
            f"{settings.sapo_temperature_neg:g}"
        )
    first = "r" if settings.delta is None else f"min(r, {settings.delta:g})"
    return f"(-min({first} A, clip(r, {1 - settings.epsilon:g}, {1 + high:g}) A))"


def _ratio(settings: GRPOConfig) -> str:
    match settings.importance_sampling_level:
        case "token":
            return "π/π_old"
        case "sequence":
            return "exp(mean_t log π/π_old)"
        case "sequence_token":
            return "sg(exp(mean_t log π/π_old)) π/sg(π)"


def _advantage(settings: GRPOConfig) -> str:
    reward = "R"
    if settings.kl_in_reward:
        reward = f"(R - {settings.beta:g} Σ_t log π_old/π_ref)"
    divided = {"group": " / (std_group + 1e-4)", "batch": " / (std_batch + 1e-4)", "none": ""}
    match settings.advantage_estimator:
        case "grpo":
            return f"({reward} - mean_group){divided[settings.reward_scale]}"
        case "rloo":
            return f"({reward} - mean of the others){divided[settings.reward_scale]}"
        case "reinforce_plus_plus":
            return f"{reward} whitened over the batch's tokens"
        case "reinforce_plus_plus_baseline":
            return f"({reward} - mean_group) whitened over the batch's tokens"
        case "gdpo":
            return "Σ_j weight_j (r_j - mean_group) / (std_group + 1e-4), whitened over the batch"
