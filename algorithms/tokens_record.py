"""What engine and trainer say of every token of a step's completions, for people to look at."""

from collections.abc import Generator
from contextlib import contextmanager

import numpy as np

from algorithms.clock import Clock
from algorithms.data import FloatRow, TokenRecord, TrainSample, float_row
from algorithms.experience import Experience, Origin
from algorithms.packing import pack, unpack
from algorithms.roles import Roles
from configs.schema import RunConfig


@contextmanager
def recording(
    step: int, experience: Experience, config: RunConfig, roles: Roles, clock: Clock
) -> Generator[None]:
    """The optimizer steps of a generation step belong into this `with` statement.

    When record.token_steps says so, the trainer is asked for its log-probabilities before them, unless it has
    been, and after them, and the recorder gets both. The time of that is `time/record`, not `time/train`.
    """
    samples = experience.samples
    if not samples or not config.records_tokens_at(step):
        yield
        return
    batch = pack(samples, config.trainer)
    with clock("record"):
        before = [sample.old_logprobs for sample in samples if sample.old_logprobs is not None]
        before = before or unpack(batch, roles.trainer.logprobs(batch))
    yield
    with clock("record"):
        after = unpack(batch, roles.trainer.logprobs(batch))
        rows = zip(samples, experience.origins, before, after, strict=True)
        roles.recorder.tokens(
            step,
            [
                TokenRecord(
                    prompt_id=origin.prompt_id,
                    index=origin.index,
                    advantage=float(sample.advantages[np.argmax(sample.loss_mask > 0)]),
                    tokens=sample.tokens[origin.start :],
                    logprobs=_sampled(sample.logprobs, sample, origin),
                    trainer_logprobs=_sampled(old, sample, origin),
                    updated_logprobs=_sampled(new, sample, origin),
                )
                for sample, origin, old, new in rows
            ],
        )


def _sampled(row: FloatRow, sample: TrainSample, origin: Origin) -> FloatRow:
    """What belongs to the completion, NaN for tokens that were not sampled."""
    return float_row(np.where(sample.loss_mask > 0, row, np.nan)[origin.start :])
