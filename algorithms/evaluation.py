"""Held-out evaluation, and the numbers that describe a set of scored completions."""

from collections.abc import Mapping, Sequence

import numpy as np

from algorithms.completions import sample_of, teacher_of
from algorithms.data import Prompt, Rollout, SamplingSettings, Scored
from algorithms.distillation import reverse_kl, teacher_logprobs
from algorithms.packing import pack, unpack
from algorithms.roles import Roles
from configs.schema import RunConfig


def evaluate(
    roles: Roles, prompts: Sequence[Prompt], config: RunConfig
) -> tuple[list[Scored], dict[str, float]]:
    """Completions of held-out prompts with their rewards, in prompt order, and the metrics.

    `eval/accuracy` is the mean value of the first reward function, if there is one, `eval/teacher_kl` the reverse
    KL to a teacher on these completions. The same prompts always have the same seeds.
    """
    if not prompts:
        return [], {}
    grpo = config.grpo
    order = {prompt.id: position for position, prompt in enumerate(prompts)}
    groups = roles.sampler.generate(
        (
            prompt,
            SamplingSettings(
                n=grpo.eval_num_generations,
                max_tokens=grpo.max_completion_length,
                temperature=grpo.eval_temperature,
                top_p=grpo.eval_top_p,
                stop=grpo.stop,
                seed=position * grpo.eval_num_generations,
            ),
        )
        for position, prompt in enumerate(prompts)
    )
    scored = sorted(roles.judge.score(groups), key=lambda each: order[each.group.prompt.id])
    metrics = {f"eval/{name}": value for name, value in reward_metrics(scored).items()}
    own: dict[str, float] = {}
    if scored[0].parts:
        own["eval/accuracy"] = metrics[f"eval/rewards/{next(iter(scored[0].parts))}/mean"]
    if config.has_teacher:
        own["eval/teacher_kl"] = _teacher_kl(roles, scored, config)
    return scored, own | metrics


def score_of(metrics: Mapping[str, float]) -> float:
    """How good an evaluation found the weights, the more the better."""
    return metrics["eval/accuracy"] if "eval/accuracy" in metrics else -metrics["eval/teacher_kl"]


def _teacher_kl(roles: Roles, scored: Sequence[Scored], config: RunConfig) -> float:
    samples = [
        sample_of(each.group.prompt, rollout, teacher_of(each.group.prompt.columns, config))
        for each in scored
        for rollout in each.group.rollouts
        if rollout.loss_mask.any()
    ]
    if not samples:
        return float("nan")
    batch = pack(samples, config.trainer)
    policy = unpack(batch, roles.trainer.logprobs(batch))
    return reverse_kl(samples, policy, teacher_logprobs(samples, batch, roles.trainer, roles.teacher))


def reward_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """Means over completions: reward, spread in groups, value and share of None by function, lengths."""
    rewards = np.stack([each.rewards for each in scored])
    rollouts = [rollout for each in scored for rollout in each.group.rollouts]
    lengths = np.array([rollout.num_sampled for rollout in rollouts])
    known = rewards[~np.isnan(rewards)]
    spread = [float(np.std(row[~np.isnan(row)])) for row in rewards if not np.isnan(row).all()]
    metrics = {
        "reward": float(known.mean()) if known.size else float("nan"),
        "reward_std": float(np.mean(spread)) if spread else float("nan"),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(np.mean([rollout.finish == "length" for rollout in rollouts])),
        "completions/aborted_ratio": float(np.mean([rollout.finish == "abort" for rollout in rollouts])),
    }
    if any(rollout.turns for rollout in rollouts):
        metrics |= _of_episodes(rollouts)
    for name in scored[0].parts:
        metrics |= _of_reward(name, scored)
    return metrics


def _of_episodes(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Turns of the model, and tokens of observations, which are not in the lengths of completions."""
    turns = [sum(message["role"] == "assistant" for message in rollout.turns) for rollout in rollouts]
    observed = [rollout.tokens.size - rollout.num_sampled for rollout in rollouts]
    return {
        "episodes/mean_turns": float(np.mean(turns)),
        "episodes/max_turns": float(max(turns)),
        "episodes/mean_observation_tokens": float(np.mean(observed)),
    }


def _of_reward(name: str, scored: Sequence[Scored]) -> dict[str, float]:
    """Of one reward: mean, deviation and share of None of its values; of its calls failures and times."""
    values = [value for each in scored for value in each.parts[name]]
    given = [value for value in values if value is not None]
    metrics = {
        f"rewards/{name}/mean": float(np.mean(given)) if given else float("nan"),
        f"rewards/{name}/std": float(np.std(given)) if given else float("nan"),
        f"rewards/{name}/none_ratio": 1 - len(given) / len(values),
    }
    verdicts = [verdict for each in scored for verdict in each.verdicts.get(name, ())]
    if not verdicts:
        return metrics
    seconds = [verdict.seconds for verdict in verdicts]
    metrics[f"rewards/{name}/error_ratio"] = float(np.mean([each.error is not None for each in verdicts]))
    metrics[f"rewards/{name}/timeout_ratio"] = float(np.mean([each.timed_out for each in verdicts]))
    metrics[f"rewards/{name}/seconds_p50"] = float(np.percentile(seconds, 50))
    metrics[f"rewards/{name}/seconds_p99"] = float(np.percentile(seconds, 99))
    for part in dict.fromkeys(part for verdict in verdicts for part in verdict.parts):
        found = [verdict.parts.get(part) for verdict in verdicts]
        known = [value for value in found if value is not None]
        if known:
            metrics[f"rewards/{name}/{part}"] = float(np.mean(known))
    return metrics
