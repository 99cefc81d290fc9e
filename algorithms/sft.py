"""Supervised fine-tuning: samples -> train step. The same trainer as GRPO, no engines."""

from collections.abc import Mapping, Sequence

import numpy as np

from algorithms.clock import Clock
from algorithms.data import TrainSample
from algorithms.packing import pack
from algorithms.progress import Forgetful, Keeper, Progress
from algorithms.prompts import Stream
from algorithms.roles import Recorder, Trainer
from configs.schema import RunConfig


def train(
    config: RunConfig,
    trainer: Trainer,
    samples: Stream[TrainSample],
    held_out: Sequence[TrainSample],
    recorder: Recorder,
    keeper: Keeper | None = None,
) -> None:
    """Run `max_steps` optimizer steps of `sft.batch_size` samples; evaluate before, after, every `eval_steps`.

    `keeper` tells after which of the steps to begin.
    """
    keeper = keeper or Forgetful()
    best = keeper.start.best
    if not keeper.start.step:
        best = _evaluate(config, trainer, held_out, recorder, 0, best)
    for step in range(keeper.start.step + 1, config.max_steps + 1):
        clock = Clock(recorder.phase)
        batch = pack(samples.take(config.sft.batch_size), config.trainer)
        with clock("train"):
            result = trainer.step(batch)
        times = clock.metrics()
        recorder.step(
            step,
            {
                **result.numbers,
                "samples": float(config.sft.batch_size),
                "tokens": float(batch.num_loss_tokens),
                "tokens_per_second": batch.num_loss_tokens / times["time/step"],
                **times,
            },
        )
        if config.saves_at(step):
            trainer.save(step)
        if config.evaluates_at(step):
            best = _evaluate(config, trainer, held_out, recorder, step, best)
        keeper.keep(Progress(step=step, best=best))


def evaluate(config: RunConfig, trainer: Trainer, held_out: Sequence[TrainSample]) -> Mapping[str, float]:
    """`eval/loss`: the cross-entropy per loss token of all held-out samples; nothing without any."""
    total, count, size = 0.0, 0, config.sft.batch_size
    for first in range(0, len(held_out), size):
        batch = pack(held_out[first : first + size], config.trainer)
        for micros, rows in zip(batch.ranks, trainer.logprobs(batch), strict=True):
            for micro, logprobs_T in zip(micros, rows, strict=True):
                total -= float(logprobs_T[micro.loss_mask_T > 0].sum(dtype=np.float64))
        count += batch.num_loss_tokens
    return {"eval/loss": total / count, "eval/num_tokens": float(count)} if count else {}


def _evaluate(
    config: RunConfig,
    trainer: Trainer,
    held_out: Sequence[TrainSample],
    recorder: Recorder,
    step: int,
    best: float,
) -> float:
    """Record an evaluation; returns the lowest loss so far."""
    with recorder.phase("evaluate"):
        metrics = evaluate(config, trainer, held_out)
    if not metrics:
        return best
    best = min(best, metrics["eval/loss"])
    recorder.evaluation(step, (), {**metrics, "eval/best_loss": best})
    trainer.rate(step, -metrics["eval/loss"])
    return best
