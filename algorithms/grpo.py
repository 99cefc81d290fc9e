"""GRPO: prompts -> rollouts -> rewards -> advantages -> train step -> weight sync."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from algorithms.advantages import has_signal
from algorithms.clock import Clock
from algorithms.data import Prompt, Scored, StepResult, TrainSample
from algorithms.evaluation import evaluate, reward_metrics, score_of
from algorithms.experience import gather, optimizer_batches, untrained
from algorithms.progress import Forgetful, Keeper, Progress
from algorithms.prompts import PromptStream
from algorithms.roles import Roles, Trainer
from algorithms.rollouts import Rollouts, staleness
from algorithms.tokens_record import recording
from configs.errors import BasculeError
from configs.schema import RunConfig


def train(
    config: RunConfig,
    roles: Roles,
    prompts: PromptStream[Prompt],
    held_out: Sequence[Prompt],
    keeper: Keeper | None = None,
) -> None:
    """Run `max_steps` steps; evaluate before, after, and every `eval_steps`.

    `keeper` tells after which of the steps to begin.
    Raises BasculeError after `grpo.max_empty_steps` steps in a row without a group that has a signal.
    """
    keeper = keeper or Forgetful()
    start = keeper.start
    version, empty = start.version, start.empty

    def evaluate_at(step: int) -> None:
        with roles.recorder.phase("evaluate"):
            scored, metrics = evaluate(roles, held_out, config)
        roles.recorder.evaluation(step, scored, metrics)
        if metrics:
            roles.trainer.rate(step, score_of(metrics))

    rollouts = Rollouts(config, roles.sampler, roles.judge, prompts, start.step, keeper.begun)
    roles.weights.sync(version)
    if not start.step:
        evaluate_at(0)
    for step in range(start.step + 1, config.max_steps + 1):
        clock = Clock(roles.recorder.phase)
        roles.judge.begin(step)
        synced: Mapping[str, float] = {}
        with clock("generate"):
            generated = rollouts.generate(step)
        roles.recorder.rollouts(step, generated.scored)
        with clock("train"):
            experience = gather(generated.kept, config, roles.trainer, roles.teacher)
        with recording(step, experience, config, roles, clock), clock("train"):
            results = list(_optimize(config, roles.trainer, experience.samples))
        empty = 0 if results else empty + 1
        _check_signal(empty, step, generated.scored, config)
        if results:
            version += 1
            with clock("sync"):
                synced = roles.weights.sync(version)
        if config.grpo.sync_ref_model and step % config.grpo.ref_model_sync_steps == 0:
            roles.trainer.move_reference(config.grpo.ref_model_mixup_alpha)
        scored = generated.scored
        metrics = reward_metrics(scored) | _means(results) | dict(experience.metrics)
        metrics |= staleness(scored, version - bool(results)) | _counts(scored)
        metrics |= dict(synced) | clock.metrics()
        metrics["tokens_per_second"] = metrics["tokens"] / metrics["time/step"]
        roles.recorder.step(step, metrics)
        if config.saves_at(step):
            roles.trainer.save(step)
        if config.evaluates_at(step):
            evaluate_at(step)
        keeper.keep(Progress(step=step, version=version, empty=empty), rollouts)


def _optimize(config: RunConfig, trainer: Trainer, samples: Sequence[TrainSample]) -> Iterator[StepResult]:
    """`num_iterations` times `steps_per_generation` optimizer steps, as far as there are samples."""
    batches = optimizer_batches(samples, config)
    for _ in range(config.grpo.num_iterations):
        for batch in batches:
            yield trainer.step(batch)


def _check_signal(empty: int, step: int, scored: Sequence[Scored], config: RunConfig) -> None:
    if empty >= config.grpo.max_empty_steps:
        raise BasculeError(
            f"{empty} steps in a row, the last one step {step}, had nothing to train on. "
            f"{untrained(scored, config.grpo)}; look at rollouts.jsonl"
        )


def _means(results: Sequence[StepResult]) -> dict[str, float]:
    rows = [each.numbers for each in results]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def _counts(scored: Sequence[Scored]) -> dict[str, float]:
    return {
        "groups/zero_variance_ratio": float(np.mean([not has_signal(each.rewards) for each in scored])),
        "samples": float(sum(each.rewards.size for each in scored)),
        "tokens": float(sum(rollout.num_sampled for each in scored for rollout in each.group.rollouts)),
    }
