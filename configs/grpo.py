"""Options of group-relative policy optimization."""

from typing import Literal

from pydantic import Field

from configs.section import Section


class GRPOConfig(Section):
    """Group-relative policy optimization. Names are TRL's."""

    num_generations: int = Field(default=8, ge=2)
    """Completions per prompt: the group that advantages are relative to."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts per generation step."""
    steps_per_generation: int = Field(default=1, ge=1)
    """Optimizer steps that one generation step is split into."""
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
    epsilon: float = Field(default=0.2, gt=0)
    """Lower clip of the probability ratio, 1 - epsilon."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """Upper clip, 1 + epsilon_high; equal to epsilon when not given."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL term (k3 estimator) to the reference; 0 builds no reference."""
    scale_rewards: Literal["group", "none"] = "group"
    """Divide advantages by the group's standard deviation, or not."""
    importance_sampling_correction: bool = True
    """Weight each token by trainer probability over engine probability, truncated."""
    importance_sampling_cap: float = Field(default=2.0, gt=0)
    """Upper truncation of that weight."""
    max_empty_steps: int = Field(default=10, ge=1)
    """End with an error after this many steps in a row in which no group carried a signal."""
