"""GRPO: prompts -> rollouts -> rewards -> advantages -> train step -> weight sync."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from algorithms.advantages import group_advantages, has_signal
from algorithms.clock import Clock
from algorithms.data import Prompt, SamplingSettings, Scored, StepResult, TrainSample, float_row, int_row
from algorithms.evaluation import evaluate, reward_metrics
from algorithms.packing import pack, with_logprobs
from algorithms.prompts import PromptStream
from algorithms.roles import Roles, Trainer
from configs.errors import BasculeError
from configs.schema import RunConfig


def train(config: RunConfig, roles: Roles, prompts: PromptStream[Prompt], held_out: Sequence[Prompt]) -> None:
    """Run `max_steps` steps; evaluate before, after, and every `eval_steps`.

    Raises BasculeError after `grpo.max_empty_steps` steps in a row without a group that has a signal.
    """
    version = empty = 0
    roles.weights.sync(version)
    roles.recorder.evaluation(0, *evaluate(roles.sampler, roles.judge, held_out, config.grpo))
    for step in range(1, config.max_steps + 1):
        clock = Clock()
        synced: Mapping[str, float] = {}
        with clock("generate"):
            requests = _requests(config, prompts.take(config.grpo.prompts_per_step), step)
            scored = [without_aborted(each) for each in roles.judge.score(roles.sampler.generate(requests))]
        # Groups finish in any order; the batch, and so the run, must not depend on it.
        scored.sort(key=lambda each: (each.group.prompt.id, each.group.rollouts[0].tokens.tobytes()))
        roles.recorder.rollouts(step, scored)
        kept = [each for each in scored if has_signal(each.rewards)]
        empty = 0 if kept else empty + 1
        _check_signal(empty, step, config)
        with clock("train"):
            samples = [sample for each in kept for sample in to_samples(each, config)]
            results = list(_optimize(config, roles.trainer, samples))
        if results:
            version += 1
            with clock("sync"):
                synced = roles.weights.sync(version)
        metrics = reward_metrics(scored) | _means(results) | dict(synced) | clock.metrics()
        metrics["groups/zero_variance_ratio"] = 1 - len(kept) / len(scored)
        metrics["tokens_per_second"] = _tokens(scored) / metrics["time/step"]
        roles.recorder.step(step, metrics)
        if config.saves_at(step):
            roles.trainer.save(step)
        if step == config.max_steps or (config.eval_steps and step % config.eval_steps == 0):
            roles.recorder.evaluation(step, *evaluate(roles.sampler, roles.judge, held_out, config.grpo))


def without_aborted(scored: Scored) -> Scored:
    """The group without the rewards of aborted completions: what came of them is not their own doing."""
    aborted = [rollout.finish == "abort" for rollout in scored.group.rollouts]
    return replace(scored, rewards=float_row(np.where(aborted, np.nan, scored.rewards)))


def to_samples(scored: Scored, config: RunConfig) -> list[TrainSample]:
    """Completions of a group as sequences to train on: those that have a reward."""
    advantages_K = group_advantages(scored.rewards, config.grpo.scale_rewards)
    prompt = scored.group.prompt.tokens
    before = np.zeros(prompt.size, np.float32)
    return [
        TrainSample(
            tokens=int_row(np.concatenate([prompt, rollout.tokens])),
            loss_mask=int_row(np.concatenate([before, rollout.loss_mask])),
            advantages=float_row(np.concatenate([before, np.full(rollout.tokens.size, advantage)])),
            logprobs=float_row(np.concatenate([before, rollout.logprobs])),
            version=rollout.versions[0],
        )
        for rollout, advantage, reward in zip(
            scored.group.rollouts, advantages_K, scored.rewards, strict=True
        )
        if not np.isnan(reward)
    ]


def _requests(
    config: RunConfig, prompts: Sequence[Prompt], step: int
) -> Iterator[tuple[Prompt, SamplingSettings]]:
    grpo = config.grpo
    for position, prompt in enumerate(prompts):
        seed = np.random.SeedSequence((config.seed, step, position)).generate_state(1)[0]
        yield (
            prompt,
            SamplingSettings(
                n=grpo.num_generations,
                max_tokens=grpo.max_completion_length,
                temperature=grpo.temperature,
                top_p=grpo.top_p,
                top_k=grpo.top_k,
                stop=grpo.stop,
                seed=int(seed),
            ),
        )


def _optimize(config: RunConfig, trainer: Trainer, samples: list[TrainSample]) -> Iterator[StepResult]:
    """`steps_per_generation` optimizer steps; old and reference log-probabilities precede the first."""
    grpo, layout = config.grpo, config.trainer
    batches = [
        pack(
            part,
            num_ranks=layout.data_parallel_size,
            micro_batch_size=layout.micro_batch_size,
            multiple=layout.tensor_model_parallel_size,
        )
        for part in (
            samples[first :: grpo.steps_per_generation] for first in range(grpo.steps_per_generation)
        )
        if part
    ]
    if grpo.beta > 0:
        batches = [with_logprobs(batch, reference=trainer.reference_logprobs(batch)) for batch in batches]
    if len(batches) > 1:
        batches = [with_logprobs(batch, old=trainer.logprobs(batch)) for batch in batches]
    for batch in batches:
        yield trainer.step(batch)


def _check_signal(empty: int, step: int, config: RunConfig) -> None:
    if empty >= config.grpo.max_empty_steps:
        raise BasculeError(
            f"{empty} steps in a row, the last one step {step}, had nothing to train on: in every group all "
            "rewards were equal. The task is too hard or too easy for the model, or the reward is constant; "
            "look at rollouts.jsonl"
        )


def _means(results: Sequence[StepResult]) -> dict[str, float]:
    rows = [
        {"loss": each.loss, "grad_norm": each.grad_norm, "learning_rate": each.learning_rate, **each.metrics}
        for each in results
    ]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def _tokens(scored: Sequence[Scored]) -> int:
    return sum(rollout.tokens.size for each in scored for rollout in each.group.rollouts)
