"""Supervised fine-tuning: samples -> train step. The same trainer as GRPO, no engines."""

from algorithms.clock import Clock
from algorithms.data import TrainSample
from algorithms.packing import pack
from algorithms.prompts import PromptStream
from algorithms.roles import Recorder, Trainer
from configs.schema import RunConfig


def train(
    config: RunConfig, trainer: Trainer, samples: PromptStream[TrainSample], recorder: Recorder
) -> None:
    """Run `max_steps` optimizer steps of `sft.batch_size` samples each."""
    for step in range(1, config.max_steps + 1):
        clock = Clock()
        batch = pack(samples.take(config.sft.batch_size), config.trainer)
        with clock("train"):
            result = trainer.step(batch)
        times = clock.metrics()
        recorder.step(
            step,
            {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
                "tokens_per_second": batch.num_loss_tokens / times["time/step"],
                **result.metrics,
                **times,
            },
        )
        if config.saves_at(step):
            trainer.save(step)
