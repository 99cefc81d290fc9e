"""With `max_lag` a run that is cut off loses no completion that was sampled ahead, and samples none twice."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.ending import EndedEarlyError, Ending
from actors.metrics import RunRecorder
from actors.resume import StateKeeper, look_for_state
from algorithms import grpo
from algorithms.data import Batch, Group, Prompt, Rollout, SamplingSettings, StepResult, float_row, int_row
from algorithms.prompts import PromptStream
from algorithms.roles import Roles
from configs.schema import RunConfig
from tests.actors.run_helpers import rows
from tests.actors.test_resume_keeper import Console, Trainers
from tests.algorithms.test_grpo import Judge, Trainer, Weights


class Ranks(Trainers, Trainer):
    """Trains nothing, and sends itself SIGTERM in one of the steps."""

    def __init__(self, directory: Path, told_in: int | None) -> None:
        Trainers.__init__(self, directory)
        self.calls, self.batches, self._told_in = [], [], told_in

    def step(self, batch: Batch) -> StepResult:  # pyright: ignore[reportIncompatibleMethodOverride]
        if len(self.batches) + 1 == self._told_in:
            os.kill(os.getpid(), signal.SIGTERM)
        self.changes += 1
        return Trainer.step(self, batch)


class Sampler:
    """Says what it was asked for: the tokens of a completion are its seed and its number."""

    def __init__(self) -> None:
        self.version = -1
        self.asked: list[tuple[str, int | None]] = []

    def generate(self, requests: Iterable[tuple[Prompt, SamplingSettings]]) -> Iterator[Group]:
        asked = list(requests)
        self.asked += [(prompt.id, settings.seed) for prompt, settings in asked]
        version = self.version
        return (
            Group(prompt=prompt, rollouts=tuple(_rollout(settings, n, version) for n in range(settings.n)))
            for prompt, settings in asked
        )


def _rollout(settings: SamplingSettings, number: int, version: int) -> Rollout:
    assert settings.seed is not None
    return Rollout(
        tokens=int_row([settings.seed % 9973, number]),
        logprobs=float_row([-1 / 3, -0.1]),
        text=f"{settings.seed} {number}",
        finish="stop",
        loss_mask=int_row([1, 1]),
        versions=(version, version),
    )


def config_of(directory: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": directory,
            "max_steps": 8,
            "model": {"model": "m"},
            "data": {"dataset": "d"},
            "grpo": {
                "num_generations": 4,
                "prompts_per_step": 2,
                "max_completion_length": 2,
                "max_lag": 2,
            },
            "checkpoint": {"resume_steps": 3},
            "rewards": [{"function": "r"}],
        }
    )


def train(directory: Path, told_in: int | None = None) -> list[tuple[str, int | None]]:
    """Run it, or the rest of it; returns what was asked of the sampler."""
    directory.mkdir(exist_ok=True)
    config, console, sampler = config_of(directory), Console(), Sampler()
    state = look_for_state(config, directory, console)
    recorder = RunRecorder(directory, config.max_steps, console, state=state)
    prompts = [Prompt(id=f"p{n}", tokens=int_row([50 + n]), messages=(), columns={}) for n in range(5)]
    stream = PromptStream(prompts, seed=0, shuffle=True)
    trainers: Any = Ranks(directory, told_in)
    roles = Roles(
        trainer=trainers,
        sampler=sampler,
        judge=Judge([1.0, 0.0, 0.0, 1.0]),
        weights=Weights(sampler),  # pyright: ignore[reportArgumentType]
        recorder=recorder,
    )
    with Ending(config, console, time.monotonic()) as ending:
        keeper = StateKeeper(config, directory, trainers, recorder, {"prompts": stream}, state, ending)
        with recorder, keeper:
            grpo.train(config, roles, stream, (), keeper)
    return sampler.asked


def test_what_was_sampled_ahead_is_trained_on_once(tmp_path: Path) -> None:
    asked = train(tmp_path / "whole")
    assert len(asked) == len(set(asked)) == 16
    with pytest.raises(EndedEarlyError, match="ended after step 4; started again it goes on after step 4"):
        train(tmp_path / "cut", told_in=4)
    # Steps 5 and 6 were sampled before it ended, with the weights of their time.
    assert train(tmp_path / "cut") == asked[12:]
    names = ("step", "prompt_id", "token_ids", "weight_versions", "reward")
    whole, cut = (
        [[row[name] for name in names] for row in rows(tmp_path / name / "rollouts.jsonl")]
        for name in ("whole", "cut")
    )
    assert len(whole) == 64
    assert cut == whole
