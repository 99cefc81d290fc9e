"""Options of group-relative policy optimization."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from configs.section import Section

LossType = Literal["dapo", "bnpo", "grpo", "dr_grpo", "cispo", "sapo"]
AdvantageEstimator = Literal["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo"]


class GRPOConfig(Section):
    """Group-relative policy optimization. Names are TRL's, or ms-swift's where TRL has none."""

    num_generations: int = Field(default=8, ge=1)
    """Completions per prompt: the group that advantages are relative to."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts per generation step."""
    steps_per_generation: int = Field(default=1, ge=1)
    """Optimizer steps that one generation step is split into."""
    num_iterations: int = Field(default=1, ge=1)
    """Times that these optimizer steps are made over the same completions."""
    max_lag: int = Field(default=0, ge=0)
    """Weight versions that a completion may be older than the weights it trains; 0 waits for every sync."""
    max_completion_length: int = Field(default=512, ge=1)
    """Longest completion in tokens; longer ones are cut and marked `length`."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the trainer's log-probabilities use the same one."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; below 1 the trained distribution is no longer the sampled one."""
    top_k: int = Field(default=-1, ge=-1)
    """Sample among the k likeliest tokens; -1 for all."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    eval_num_generations: int = Field(default=1, ge=1)
    """Completions of each held-out prompt; the metrics are means over them."""
    eval_temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of an evaluation; 0 takes the likeliest token."""
    eval_top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling of an evaluation."""

    advantage_estimator: AdvantageEstimator = "grpo"
    """What a reward is compared with: `grpo` the group's mean, `rloo` the mean of the others in the group,
    `reinforce_plus_plus` the batch's mean, its `_baseline` form the group's, both then whitened over the tokens
    of the batch, `gdpo` the group's mean for each reward function by itself."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Divide advantages of `grpo` and `rloo` by the deviation of rewards in the group, or in all trained on. By
    default by the group's for grpo, as in TRL, and not for rloo; ms-swift divides both."""
    soft_overlong_cache: int | None = Field(default=None, ge=1)
    """Last tokens before max_completion_length in which the reward falls evenly by 1, as in DAPO."""
    mask_truncated_completions: bool = False
    """Train nothing on completions that were cut at max_completion_length. They count in their group's mean,
    not in the loss's denominator."""
    filter_zero_variance: bool = True
    """Leave groups whose rewards are equal out of the step and of the loss's denominator. `false` keeps
    them, as TRL does: they have no policy term, but count, and have their KL and entropy terms."""
    dynamic_sample: bool = False
    """Sample further prompts in place of groups whose rewards are equal, as in DAPO."""
    max_resample_times: int = Field(default=3, ge=1)
    """How often in one step, at most; the step then goes on with what there is."""
    max_empty_steps: int = Field(default=10, ge=1)
    """End with an error after this many steps in a row in which no group carried a signal."""

    loss_type: LossType = "dapo"
    """How terms of tokens become one loss. `dapo`: mean over the tokens of the generation step. `bnpo`: over
    those of the optimizer step, not of a micro-batch as in TRL. `grpo`: mean over sequences of means over their
    tokens. `dr_grpo`: sum over max_completion_length times sequences. `cispo`: dapo's mean of weighted
    log-probabilities. `sapo`: grpo's mean of soft-gated ratios."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = "token"
    """Ratio of new to old policy: of each token; `sequence` (GSPO) exp of the mean over the sequence; or
    that value with each token's own gradient (GSPO-token)."""
    epsilon: float = Field(default=0.2, gt=0)
    """Lower clip of the ratio, 1 - epsilon."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Upper clip, 1 + epsilon_high; equal to epsilon when not given. For cispo the cap of the ratio itself, 5
    when not given: TRL and ms-swift take epsilon there, which weights every token by 0.2."""
    delta: float | None = Field(default=None, gt=1)
    """Cap of the ratio where the advantage is negative, which clipping leaves open (verl: clip_ratio_c)."""
    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    """Steepness of sapo's gate for positive advantages."""
    sapo_temperature_neg: float = Field(default=1.05, gt=0)
    """The same for negative ones."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL term to the reference; 0 builds no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL term in the loss. k1 there has no gradient in expectation on-policy."""
    use_bias_correction_kl: bool = False
    """Multiply the KL term by the token's ratio, whose gradient is then unbiased (DeepSeek-V3.2)."""
    kl_in_reward: bool = False
    """Subtract beta times the completion's summed k1 from its reward in place of the term in the loss."""
    sync_ref_model: bool = False
    """Move the reference towards the policy on a schedule; it needs weights of its own."""
    ref_model_sync_steps: int = Field(default=512, ge=1)
    """Generation steps between two such moves."""
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1)
    """Share of the policy in the moved reference; the rest stays."""
    importance_sampling_correction: bool = True
    """Weight by the trainer's probability of what was sampled over the engine's (old policy over sampler)."""
    importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate"
    """`token_truncate`: each token's ratio, at most the cap. `token_mask` (IcePop): the ratio, 0 outside of
    [min, cap]. `sequence_truncate`: the sequence's ratio, at most the cap. `sequence_mask`: 0 for sequences
    outside of [min, cap], else the product ratio, or for the geometric one each token's own, capped."""
    importance_sampling_ratio: Literal["geometric", "product"] = "geometric"
    """A sequence's ratio: exp of the mean (ms-swift, NeMo-RL) or of the sum (TRL, verl) over its tokens. A cap
    for one means nothing for the other: over 1000 tokens, 1.01 and 20959 are the same distance."""
    importance_sampling_cap: float = Field(default=2.0, gt=0)
    """Upper bound of the ratio."""
    importance_sampling_min: float | None = Field(default=None, gt=0)
    """Lower bound, for the masks; none when not given."""
    off_policy_mask_threshold: float | None = Field(default=None, gt=0)
    """Drop sequences with a negative advantage whose mean log-probability fell by more than this since they
    were sampled (DeepSeek-V3.2)."""
    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)
    """Share of tokens, those with the highest entropy in the whole generation step, that have a policy term."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of an entropy bonus."""
    teacher_kl_coef: float = Field(default=0.0, ge=0)
    """On-policy distillation: add this times log(teacher / old policy) of each token to its advantage, which
    lowers the reverse KL to the teacher. Rewards may then be left out. 0 needs no teacher."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of one generation step."""
        return self.steps_per_generation * self.num_iterations

    @property
    def reward_scale(self) -> Literal["group", "batch", "none"]:
        """What advantages are divided by."""
        if self.scale_rewards is not None:
            return self.scale_rewards
        return "group" if self.advantage_estimator == "grpo" else "none"


def check_grpo(grpo: GRPOConfig, *, has_rewards: bool) -> None:
    """Raises ValueError naming the option that contradicts another."""
    if has_rewards and grpo.num_generations < 2 and grpo.advantage_estimator != "reinforce_plus_plus":
        raise ValueError(
            "grpo.num_generations: a reward is compared with others of its group, so 2 is the least; 1 goes with "
            "advantage_estimator reinforce_plus_plus, or with teacher_kl_coef and no rewards"
        )
    if grpo.prompts_per_step % grpo.steps_per_generation:
        raise ValueError(
            f"grpo.steps_per_generation: {grpo.steps_per_generation} does not divide "
            f"grpo.prompts_per_step {grpo.prompts_per_step}"
        )
    for problem in (*_of_rewards(grpo), *_of_the_loss(grpo)):
        raise ValueError(f"grpo.{problem}")


def _of_rewards(grpo: GRPOConfig) -> Iterator[str]:
    if grpo.scale_rewards is not None and grpo.advantage_estimator not in ("grpo", "rloo"):
        yield f"scale_rewards: {grpo.advantage_estimator} has a scale of its own; leave it out"
    if grpo.soft_overlong_cache is not None and grpo.soft_overlong_cache >= grpo.max_completion_length:
        yield "soft_overlong_cache: has to be below grpo.max_completion_length"
    if grpo.kl_in_reward and grpo.advantage_estimator == "gdpo":
        yield (
            "kl_in_reward: gdpo compares the values of each reward function by themselves, and the KL is none of "
            "them; set it to false, which puts the KL into the loss, or take another advantage_estimator"
        )
    if grpo.kl_in_reward and grpo.mask_truncated_completions:
        # What is masked is not put through policy and reference, so its KL is unknown. Without it its reward
        # would be on another scale than those it is averaged with; leaving it out of the mean would let this
        # option change what the other one promises.
        yield (
            "kl_in_reward: completions that mask_truncated_completions masks have no KL, but count in their "
            "group's mean; set one of the two to false"
        )
    if grpo.dynamic_sample and grpo.advantage_estimator == "reinforce_plus_plus":
        yield (
            "dynamic_sample: replaces groups whose rewards are equal, which reinforce_plus_plus trains on too, "
            "since it compares with the batch; set it to false, or take another advantage_estimator"
        )
    if grpo.dynamic_sample and grpo.teacher_kl_coef > 0:
        yield (
            "dynamic_sample: replaces groups whose rewards are equal, which teacher_kl_coef trains on too; leave "
            "one of them out"
        )
    if grpo.dynamic_sample and not grpo.filter_zero_variance:
        yield "filter_zero_variance: dynamic_sample replaces these groups; set one of the two to false"


def _of_the_loss(grpo: GRPOConfig) -> Iterator[str]:
    high = grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high
    if grpo.loss_type in ("cispo", "sapo") and grpo.delta is not None:
        yield f"delta: {grpo.loss_type} does not clip; leave it out"
    if grpo.delta is not None and grpo.delta <= 1 + high:
        yield f"delta: {grpo.delta} has to be above 1 + epsilon_high = {1 + high:g}, else it is what clips"
    if grpo.loss_type == "cispo" and grpo.importance_sampling_level == "sequence":
        yield "importance_sampling_level: cispo weights log-probabilities of tokens; use sequence_token"
    if grpo.beta == 0:
        kl_options = {
            "kl_in_reward": grpo.kl_in_reward,
            "use_bias_correction_kl": grpo.use_bias_correction_kl,
            "sync_ref_model": grpo.sync_ref_model,
        }
        for name in (name for name, given in kl_options.items() if given):
            yield f"{name}: is not used while grpo.beta is 0"
    if grpo.kl_in_reward and grpo.use_bias_correction_kl:
        yield "use_bias_correction_kl: is of the KL term in the loss, which kl_in_reward takes out of it"
    low = grpo.importance_sampling_min
    if low is not None and not grpo.importance_sampling_mode.endswith("mask"):
        yield f"importance_sampling_min: {grpo.importance_sampling_mode} has no lower bound; use a mask"
    if low is not None and low >= grpo.importance_sampling_cap:
        yield f"importance_sampling_min: {low} is not below importance_sampling_cap"
