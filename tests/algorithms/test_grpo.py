"""The loop with fakes: a two-armed bandit whose policy is one number, so the outcome can be computed."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest

from algorithms import grpo
from algorithms.data import (
    Batch,
    FloatRow,
    Group,
    Prompt,
    Rollout,
    SamplingSettings,
    Scored,
    StepResult,
    TokenRecord,
    float_row,
    int_row,
)
from algorithms.prompts import PromptStream
from algorithms.roles import Roles
from algorithms.rollouts import Rollouts, with_overlong
from configs.errors import BasculeError
from configs.grpo import GRPOConfig
from configs.schema import RunConfig


def config(token_steps: int = 0, **grpo_settings: object) -> RunConfig:
    settings = {"num_generations": 4, "prompts_per_step": 2, "max_completion_length": 1, **grpo_settings}
    return RunConfig.model_validate(
        {
            "max_steps": 3,
            "model": {"model": "m"},
            "data": {"dataset": "d"},
            "record": {"token_steps": token_steps},
            "grpo": settings,
            "rewards": [{"function": "r"}],
        }
    )


class Trainer:
    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.calls: list[str] = []
        self.rated: dict[int, float] = {}

    def step(self, batch: Batch) -> StepResult:
        self.calls.append("step")
        self.batches.append(batch)
        return StepResult(loss=1.0, grad_norm=2.0, learning_rate=0.1, metrics={"kl": 3.0})

    def logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        self.calls.append("logprobs")
        return tuple(tuple(float_row(m.logprobs_T) for m in rank) for rank in batch.ranks)

    def reference_logprobs(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        self.calls.append("reference")
        return self.logprobs(batch)

    def entropies(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """The last digit of the prompt's token, plus the label."""
        self.calls.append("entropies")
        return tuple(tuple(float_row(m.tokens_T % 10 + m.labels_T) for m in rank) for rank in batch.ranks)

    def rate(self, step: int, score: float) -> None:
        self.rated[step] = score

    def move_reference(self, share: float) -> None:
        self.calls.append(f"reference moves by {share}")


class Sampler:
    """Completes with tokens 0, 1, 2, ... and finishes groups in reverse order."""

    def __init__(self) -> None:
        self.version = -1
        self.settings: list[SamplingSettings] = []
        self.finish = "stop"

    def generate(self, requests: Iterable[tuple[Prompt, SamplingSettings]]) -> Iterator[Group]:
        groups = []
        for prompt, settings in requests:
            self.settings.append(settings)
            groups.append(
                Group(prompt=prompt, rollouts=tuple(self._rollout(index) for index in range(settings.n)))
            )
        # What a group is sampled with is decided when it begins.
        return reversed(groups)

    def _rollout(self, index: int) -> Rollout:
        return Rollout(
            tokens=int_row([index]),
            logprobs=float_row([-1.0]),
            text=str(index),
            finish="abort" if index == 3 and self.finish == "abort" else "stop",
            loss_mask=int_row([1]),
            versions=(self.version, self.version),
        )


class Judge:
    def __init__(self, rewards: list[float]) -> None:
        self.rewards = rewards
        self.begun: list[int] = []

    def begin(self, step: int) -> None:
        self.begun.append(step)

    def score(self, groups: Iterable[Group]) -> Iterator[Scored]:
        for group in groups:
            values = self.rewards[: len(group.rollouts)]
            yield Scored(group=group, rewards=float_row(values), parts={"r": tuple(values)})


class Overlapping(Sampler):
    """Says when sampling begins, among what the trainer is called for."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def generate(self, requests: Iterable[tuple[Prompt, SamplingSettings]]) -> Iterator[Group]:
        groups = list(super().generate(requests))
        if len(groups) > 1:
            self.calls.append("begin")
        return iter(groups)


class Weights:
    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def sync(self, version: int) -> Mapping[str, float]:
        self.sampler.version = version
        return {"sync/bytes": 8.0}


class Recorder:
    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []
        self.versions: list[int] = []
        self.evaluated: list[int] = []
        self.recorded: dict[int, list[TokenRecord]] = {}

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(metrics)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def rollouts(self, step: int, scored: Iterable[Scored]) -> None:
        self.versions += [each.group.rollouts[0].versions[0] for each in scored]

    def evaluation(self, step: int, scored: Iterable[Scored], metrics: Mapping[str, float]) -> None:
        self.evaluated.append(step)

    def tokens(self, step: int, records: Iterable[TokenRecord]) -> None:
        self.recorded[step] = list(records)

    def event(self, step: int, kind: str, text: str, **details: object) -> None:
        raise AssertionError("the loop has none")


def prompts() -> list[Prompt]:
    return [Prompt(id=f"p{i}", tokens=int_row([50 + i]), messages=(), columns={}) for i in range(4)]


def run(config: RunConfig, rewards: list[float], finish: str = "stop") -> tuple[Trainer, Sampler, Recorder]:
    trainer, sampler, recorder = Trainer(), Sampler(), Recorder()
    sampler.finish = finish
    roles = Roles(
        trainer=trainer, sampler=sampler, judge=Judge(rewards), weights=Weights(sampler), recorder=recorder
    )
    grpo.train(config, roles, PromptStream(prompts(), seed=0, shuffle=False), prompts()[:1])
    return trainer, sampler, recorder


def test_every_step_trains_on_what_the_current_weights_sampled() -> None:
    trainer, _, recorder = run(config(), [1.0, 0.0, 0.0, 1.0])
    assert recorder.versions == [0, 0, 1, 1, 2, 2]
    assert recorder.evaluated == [0, 3]
    assert trainer.rated == {0: 1.0, 3: 1.0}
    assert trainer.calls == ["step"] * 3
    assert recorder.steps[0]["loss"] == 1.0
    assert recorder.steps[0]["reward"] == 0.5
    assert recorder.steps[0]["sync/bytes"] == 8.0


def test_the_batch_holds_prompt_and_completion_with_the_advantages_of_the_group() -> None:
    trainer, _, _ = run(config(scale_rewards="none"), [1.0, 0.0, 0.0, 1.0])
    (micro,) = trainer.batches[0].ranks[0]
    used = micro.loss_mask_T == 1
    # Prompts 50 and 51, each with completions 0 to 3, and nothing that depends on who finished first.
    assert sorted(zip(micro.tokens_T[used], micro.labels_T[used], strict=True)) == [
        (50 + prompt, token) for prompt in (0, 1) for token in range(4)
    ]
    by_label = {
        int(label): adv for label, adv in zip(micro.labels_T[used], micro.advantages_T[used], strict=True)
    }
    assert by_label == {0: 0.5, 1: -0.5, 2: -0.5, 3: 0.5}
    np.testing.assert_array_equal(micro.logprobs_T[used], [-1.0] * 8)


def test_seeds_differ_between_prompts_and_steps_and_repeat_between_runs() -> None:
    _, first, _ = run(config(), [1.0, 0.0, 0.0, 1.0])
    _, second, _ = run(config(), [1.0, 0.0, 0.0, 1.0])
    seeds = [settings.seed for settings in first.settings if settings.n > 1]
    assert len(set(seeds)) == 6
    assert seeds == [settings.seed for settings in second.settings if settings.n > 1]
    greedy = [settings for settings in first.settings if settings.n == 1]
    assert {settings.temperature for settings in greedy} == {0.0}


def test_steps_without_signal_do_not_train_and_end_the_run_after_the_limit() -> None:
    message = (
        "2 steps in a row, the last one step 2, had nothing to train on. Of its 8 completions 8 are in groups"
    )
    with pytest.raises(BasculeError, match=message):
        run(config(max_empty_steps=2), [1.0, 1.0, 1.0, 1.0])
    trainer, _, recorder = run(config(max_empty_steps=4), [1.0, 1.0, 1.0, 1.0])
    assert trainer.calls == []
    assert recorder.steps[0]["groups/zero_variance_ratio"] == 1.0
    assert "loss" not in recorder.steps[0]
    assert recorder.versions == [0] * 6


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_rewards": "batch"},
        {"advantage_estimator": "rloo"},
        {"advantage_estimator": "reinforce_plus_plus_baseline"},
        {"advantage_estimator": "gdpo"},
    ],
)
def test_steps_without_signal_are_empty_under_every_estimator(settings: dict[str, object]) -> None:
    with pytest.raises(BasculeError, match="2 steps in a row, the last one step 2"):
        run(config(max_empty_steps=2, **settings), [1.0, 1.0, 1.0, 1.0])


def test_what_is_left_out_of_an_empty_step_is_counted_by_reason() -> None:
    message = (
        r"Of its 8 completions 4 are in groups .*, 2 have no reward of any function, 2 were aborted; look"
    )
    with pytest.raises(BasculeError, match=message):
        run(config(max_empty_steps=1), [1.0, 1.0, float("nan"), 0.0], finish="abort")


def test_gdpo_does_not_train_on_a_group_whose_values_differ_by_an_aborted_one_alone() -> None:
    with pytest.raises(BasculeError, match="1 steps in a row, the last one step 1"):
        run(config(max_empty_steps=1, advantage_estimator="gdpo"), [1.0, 1.0, 1.0, 0.0], finish="abort")


def test_more_optimizer_steps_use_log_probabilities_from_before_the_first() -> None:
    trainer, _, _ = run(config(steps_per_generation=2, beta=0.1), [1.0, 0.0, 0.0, 1.0])
    once = ["reference", "logprobs", "logprobs"] + ["step"] * 2
    assert trainer.calls == once * 3
    for batch in trainer.batches:
        assert batch.num_loss_tokens == 4
        assert batch.ranks[0][0].old_logprobs_T is not None
        assert batch.ranks[0][0].ref_logprobs_T is not None


def test_completions_without_reward_or_aborted_are_not_trained_on() -> None:
    trainer, _, _ = run(config(), [1.0, float("nan"), 0.0, 1.0], finish="abort")
    assert trainer.batches[0].num_loss_tokens == 2 * 2
    (micro,) = trainer.batches[0].ranks[0]
    assert set(micro.labels_T[micro.loss_mask_T == 1]) == {0, 2}


def test_iterations_repeat_the_optimizer_steps_on_the_same_samples() -> None:
    trainer, _, recorder = run(config(steps_per_generation=2, num_iterations=3), [1.0, 0.0, 0.0, 1.0])
    assert trainer.calls == (["logprobs"] + ["step"] * 6) * 3
    first, second = trainer.batches[0], trainer.batches[1]
    assert trainer.batches[2] == first
    assert trainer.batches[5] == second
    # One sync for all of them.
    assert recorder.versions == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_engines_begin_steps_ahead_and_no_sample_is_older_than_allowed(lag: int) -> None:
    trainer, recorder = Trainer(), Recorder()
    sampler = Overlapping(trainer.calls)
    roles = Roles(
        trainer=trainer,
        sampler=sampler,
        judge=Judge([1.0, 0.0, 0.0, 1.0]),
        weights=Weights(sampler),
        recorder=recorder,
    )
    run_config = config(max_lag=lag)
    stream = PromptStream(prompts(), seed=0, shuffle=False)
    grpo.train(run_config, roles, stream, prompts()[:1])
    begun = min(1 + lag, 3)
    assert trainer.calls == ["begin"] * begun + ["step", "begin"] * (3 - begun) + ["step"] * begun
    # Versions that sampled for the three steps, two prompts each.
    assert recorder.versions[::2] == [max(0, step - lag) for step in range(3)]
    assert [row["sampling/staleness_max"] for row in recorder.steps] == [min(step, lag) for step in range(3)]


def test_the_reference_moves_on_its_schedule() -> None:
    settings = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
    trainer, _, _ = run(config(**settings), [1.0, 0.0, 0.0, 1.0])
    moves = [call for call in trainer.calls if call.startswith("reference moves")]
    assert moves == ["reference moves by 0.25"]
    assert trainer.calls.index(moves[0]) == trainer.calls.index("step", trainer.calls.index("step") + 1) + 1


class Rewarded(Judge):
    """Rewards by the prompt's name; parts are the rewards."""

    def __init__(self, by_prompt: Mapping[str, list[float]]) -> None:
        self.by_prompt = by_prompt

    def score(self, groups: Iterable[Group]) -> Iterator[Scored]:
        for group in groups:
            values = self.by_prompt[group.prompt.id]
            yield Scored(group=group, rewards=float_row(values), parts={"r": tuple(values)})


def generated(by_prompt: Mapping[str, list[float]], **settings: object) -> tuple[Rollouts, Sampler]:
    sampler = Sampler()
    stream = PromptStream(prompts(), seed=0, shuffle=False)
    return Rollouts(config(**settings), sampler, Rewarded(by_prompt), stream), sampler


MIXED = {"p0": [1.0] * 4, "p1": [1.0, 0.0, 0.0, 0.0], "p2": [0.0] * 4, "p3": [0.0, 1.0, 1.0, 0.0]}


def test_dynamic_sampling_draws_further_prompts_in_place_of_those_without_signal() -> None:
    rollouts, sampler = generated(MIXED, dynamic_sample=True)
    found = rollouts.generate(1)
    assert [each.group.prompt.id for each in found.scored] == ["p0", "p1", "p2", "p3"]
    assert [each.group.prompt.id for each in found.kept] == ["p1", "p3"]
    assert len({settings.seed for settings in sampler.settings}) == 4
    # Two refills at most; what there is by then is trained on.
    rollouts, _ = generated(MIXED | {"p3": [1.0] * 4}, dynamic_sample=True, max_resample_times=2)
    found = rollouts.generate(1)
    assert [each.group.prompt.id for each in found.scored] == ["p0", "p1", "p2", "p3"]
    assert [each.group.prompt.id for each in found.kept] == ["p1"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, ["p1"]),
        ({"filter_zero_variance": False}, ["p0", "p1"]),
        # The mean of the batch, not of the group, is what these are compared with.
        ({"advantage_estimator": "reinforce_plus_plus"}, ["p0", "p1"]),
        ({"advantage_estimator": "gdpo"}, ["p1"]),
    ],
)
def test_groups_without_signal_are_left_out_where_they_have_nothing_to_teach(
    settings: dict[str, object], kept: list[str]
) -> None:
    rollouts, _ = generated(MIXED, **settings)
    assert [each.group.prompt.id for each in rollouts.generate(1).kept] == kept


def test_soft_overlong_lowers_the_reward_evenly_over_the_last_tokens() -> None:
    settings = GRPOConfig(max_completion_length=10, soft_overlong_cache=4)
    prompt = prompts()[0]
    rollouts = tuple(
        Rollout(
            tokens=int_row([0] * length),
            logprobs=float_row([0] * length),
            text="",
            finish="stop",
            loss_mask=int_row([1] * length),
            versions=(0, 0),
        )
        for length in (6, 7, 9, 10)
    )
    scored = Scored(group=Group(prompt=prompt, rollouts=rollouts), rewards=float_row([1] * 4), parts={})
    found = with_overlong(scored, settings)
    np.testing.assert_allclose(found.rewards, [1, 0.75, 0.25, 0])
    assert found.parts["soft_overlong"] == (0, -0.25, -0.75, -1)
