"""The loop of gkd with fakes, and its loss by hand."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from algorithms import gkd
from algorithms.data import (
    Batch,
    FloatRow,
    Group,
    Prompt,
    Rollout,
    SamplingSettings,
    Scored,
    StepResult,
    TopTokens,
    TrainSample,
    float_row,
    int_row,
)
from algorithms.losses import gkd_loss
from algorithms.packing import pack
from algorithms.prompts import PromptStream
from algorithms.roles import Predictions, TopTeacher
from configs.errors import BasculeError
from configs.gkd import GKDConfig
from configs.schema import RunConfig, TrainerConfig


def config(teacher: dict[str, object] | None = None, **settings: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "algorithm": "gkd",
            "max_steps": 8,
            "eval_steps": 4,
            "model": {"model": "m", "teacher_model": "t"},
            "teacher": teacher or {},
            "data": {"dataset": "d"},
            "gkd": {"batch_size": 2, "max_completion_length": 3, **settings},
        }
    )


def sample(*tokens: int) -> TrainSample:
    zeros = float_row(np.zeros(len(tokens)))
    mask = int_row([0, *[1] * (len(tokens) - 1)])
    return TrainSample(tokens=int_row(tokens), loss_mask=mask, advantages=zeros, logprobs=zeros, version=0)


class Everything:
    """Trainer, sampler, weights and recorder; writes down what is asked of it, in order."""

    def __init__(self, abort: int = 0, empty: int = 0) -> None:
        """Of each step the first `abort` completions are aborted, and the first `empty` have no token."""
        self.calls: list[str] = []
        self.batches: list[Batch] = []
        self.seeds: list[int | None] = []
        self.metrics: list[Mapping[str, float]] = []
        self.evaluations: list[tuple[int, Mapping[str, float]]] = []
        self.evaluated: list[int] = []
        self._abort, self._empty = abort, empty

    def train(self, batch: Batch) -> StepResult:
        self.calls.append("train")
        self.batches.append(batch)
        return StepResult(loss=1.0, grad_norm=2.0, learning_rate=0.1, metrics={})

    def divergences(self, batch: Batch) -> tuple[tuple[FloatRow, ...], ...]:
        """The divergence of a token is its number; what is off the mask must not count."""
        self.evaluated.append(sum(micro.loss_mask_T.sum() for rank in batch.ranks for micro in rank))
        return tuple(
            tuple(float_row(micro.labels_T + 1000 * (micro.loss_mask_T == 0)) for micro in rank)
            for rank in batch.ranks
        )

    def generate(self, requests: Iterable[tuple[Prompt, SamplingSettings]]) -> Iterator[Group]:
        self.calls.append("generate")
        groups: list[Group] = []
        for prompt, settings in requests:
            self.seeds.append(settings.seed)
            tokens = [] if len(groups) < self._empty else [7, 8]
            rollout = Rollout(
                tokens=int_row(tokens),
                logprobs=float_row([-1.0] * len(tokens)),
                text="",
                finish="abort" if len(groups) < self._abort else "stop",
                loss_mask=int_row([1] * len(tokens)),
                versions=(0, 0),
            )
            groups.append(Group(prompt=prompt, rollouts=(rollout,)))
        yield from reversed(groups)

    def sync(self, version: int) -> Mapping[str, float]:
        self.calls.append(f"sync {version}")
        return {}

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.append(metrics)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def rollouts(self, step: int, scored: Iterable[Scored]) -> None:
        assert all(np.isnan(each.rewards).all() for each in scored)

    def evaluation(self, step: int, scored: Iterable[Scored], metrics: Mapping[str, float]) -> None:
        assert not list(scored)
        self.evaluations.append((step, metrics))


class Trainer:
    def __init__(self, everything: Everything) -> None:
        self.step = everything.train
        self.divergences = everything.divergences
        self.saved: list[int] = []
        self.rated: dict[int, float] = {}

    def rate(self, step: int, score: float) -> None:
        self.rated[step] = score

    def save(self, step: int) -> None:
        self.saved.append(step)


def run(
    run_config: RunConfig,
    held_out: tuple[TrainSample, ...] = (),
    teacher: TopTeacher | None = None,
    writer: Everything | None = None,
    **left_out: int,
) -> Everything:
    everything = Everything(**left_out)
    prompts = [Prompt(id=str(n), tokens=int_row([1, n]), messages=(), columns={}) for n in range(4)]
    samples = [sample(1, 2, 3, 4)] * 4
    roles = gkd.Roles(
        trainer=Trainer(everything),  # pyright: ignore[reportArgumentType]
        student=gkd.Student(sampler=everything, weights=everything),
        teacher=teacher,
        writer=writer,
        recorder=everything,
    )
    gkd.train(
        run_config,
        roles,
        PromptStream(prompts, seed=1, shuffle=False),
        PromptStream(samples, seed=1, shuffle=False),
        held_out,
    )
    return everything


def test_only_on_policy_steps_sync_and_sample() -> None:
    on_policy = run(config(lmbda=1))
    assert on_policy.calls == [call for n in range(8) for call in (f"sync {n}", "generate", "train")]
    assert len(set(on_policy.seeds)) == 16
    assert all((micro.advantages_T == 0).all() for b in on_policy.batches for r in b.ranks for micro in r)
    given = run(config(lmbda=0, sft_alpha=0.5))
    assert given.calls == ["train"] * 8
    for batch in given.batches:
        (micro,) = batch.ranks[0]
        assert np.array_equal(micro.advantages_T, micro.loss_mask_T)
        assert micro.tokens_T.tolist() == [1, 2, 3, 4] * 2


def test_the_draw_depends_on_seed_and_step_only() -> None:
    drawn = [gkd.is_on_policy(config(lmbda=0.3), step) for step in range(1, 2001)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.03)
    assert drawn == [gkd.is_on_policy(config(lmbda=0.3), step) for step in range(1, 2001)]
    mixed = run(config(lmbda=0.5))
    assert [row["on_policy"] for row in mixed.metrics] == [
        float(gkd.is_on_policy(config(lmbda=0.5), step)) for step in range(1, 9)
    ]


def test_a_teacher_that_writes_completes_the_prompts_of_the_other_steps() -> None:
    written = config({"teacher_backend": "engine"}, lmbda=0.5, seq_kd=True, gkd_logits_topk=4, sft_alpha=0.5)
    writer = Everything()
    everything = run(written, writer=writer)
    own = [gkd.is_on_policy(written, step) for step in range(1, 9)]
    assert everything.calls.count("generate") == sum(own) > 0
    assert writer.calls == ["generate"] * (8 - sum(own))
    for is_own, batch in zip(own, everything.batches, strict=True):
        (micro,) = batch.ranks[0]
        # Cross-entropy is added on what the teacher wrote.
        assert set(micro.advantages_T[micro.loss_mask_T > 0]) == {0.0 if is_own else 1.0}
        assert micro.labels_T[micro.loss_mask_T > 0].tolist() == [7, 8] * 2
    # Steps of both kinds take prompts from one stream, and none twice in an epoch.
    assert len({*everything.seeds, *writer.seeds}) == 16


@pytest.mark.parametrize("left_out", ["abort", "empty"])
def test_a_completion_that_was_aborted_or_has_no_token_is_left_out(left_out: str) -> None:
    everything = run(config(lmbda=1), **{left_out: 1})
    assert [batch.num_loss_tokens for batch in everything.batches] == [2] * 8


@pytest.mark.parametrize("left_out", ["abort", "empty"])
def test_a_step_that_is_left_with_nothing_is_recorded_and_trains_nothing(left_out: str) -> None:
    everything = run(config(lmbda=1), **{left_out: 2})
    assert everything.calls == [call for n in range(8) for call in (f"sync {n}", "generate")]
    assert len(everything.metrics) == 8
    for row in everything.metrics:
        assert (row["on_policy"], row["tokens_per_second"], "loss" in row) == (1, 0, False)


def test_many_empty_steps_in_a_row_end_the_run() -> None:
    with pytest.raises(
        BasculeError, match=r"3 sampled steps in a row, the last one step 3, .* 2 were aborted"
    ):
        run(config(lmbda=1, max_empty_steps=3), abort=2)
    # Steps on the dataset's completions between them say nothing about engines.
    own = [step for step in range(1, 9) if gkd.is_on_policy(config(lmbda=0.5), step)]
    assert own[2] > 3
    with pytest.raises(BasculeError, match=f"3 sampled steps in a row, the last one step {own[2]}"):
        run(config(lmbda=0.5, max_empty_steps=3), abort=2)


def test_evaluation_is_the_mean_over_the_tokens_of_batches_of_held_out_completions() -> None:
    held_out = (sample(1, 2, 3), sample(1, 10, 20, 30, 40), sample(1, 9))
    everything = run(config(lmbda=0), held_out=held_out)
    assert [step for step, _ in everything.evaluations] == [0, 4, 8]
    assert everything.evaluated == [6, 1] * 3
    for _, metrics in everything.evaluations:
        assert metrics == {"eval/divergence": pytest.approx((2 + 3 + 100 + 9) / 7)}


def test_loss_by_hand() -> None:
    given = gkd._given(sample(1, 2, 3))  # pyright: ignore[reportPrivateUsage]
    (micro,) = pack([given], TrainerConfig()).ranks[0]
    predictions = Predictions(
        logprobs_T=torch.tensor([-1.0, -2.0, -50.0]),
        entropy_T=torch.tensor([0.1, 0.2, 9.0]),
        divergence_T=torch.tensor([0.5, 0.25, 9.0]),
    )
    total, metrics = gkd_loss(GKDConfig(sft_alpha=0.1))(predictions, micro)
    assert float(total) == pytest.approx(0.75 + 0.1 * 3.0)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"divergence": 0.75, "cross_entropy": 3.0, "entropy": 0.3}
    )
    (own,) = pack([sample(1, 2, 3)], TrainerConfig()).ranks[0]
    assert float(gkd_loss(GKDConfig(sft_alpha=0.1))(predictions, own)[0]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"lmbda": 1, "sft_alpha": 0.1}, "gkd.sft_alpha: is not used while gkd.lmbda is 1"),
        ({"gkd_topk_tail": True}, "gkd.gkd_topk_tail: is the tail of gkd.gkd_logits_topk"),
        (
            {"gkd_logits_topk": 4, "gkd_topk_tail": True, "temperature": 0.9, "loss_temperature": "same"},
            "at temperature 0.9 does not follow from k tokens",
        ),
        ({"seq_kd": True}, r"gkd\.seq_kd: .* needs teacher\.teacher_backend engine"),
    ],
)
def test_options_that_contradict_each_other_are_named(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        config(**settings)


def test_a_teacher_is_needed() -> None:
    with pytest.raises(ValidationError, match=r"model\.teacher_model: gkd needs a teacher"):
        RunConfig.model_validate({"algorithm": "gkd", "model": {"model": "m"}, "data": {"dataset": "d"}})


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"teacher_model_server": "http://h"}, "gkd needs a teacher in one place, there are 2"),
        ({"teacher_column": "domain"}, "teacher_column: goes with teacher.teacher_model_servers"),
        ({"teacher_backend": "engine"}, r"gkd\.gkd_logits_topk: .* a teacher's engine is asked for"),
    ],
)
def test_teachers_that_cannot_be_asked_are_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        config(teacher=settings)


def test_a_teacher_elsewhere_is_asked_about_what_is_trained() -> None:
    class Asked:
        def top_tokens(self, samples: Sequence[TrainSample]) -> list[TopTokens]:
            return [
                TopTokens(
                    ids=int_row(sample.tokens[:, None]),
                    logprobs=float_row(np.full((sample.tokens.size, 1), -0.5)),
                )
                for sample in samples
            ]

    everything = run(config(lmbda=1), teacher=Asked())
    for batch in everything.batches:
        for micro in batch.ranks[0]:
            assert micro.teacher_ids_TK is not None
            trained = micro.loss_mask_T > 0
            assert np.array_equal(micro.teacher_ids_TK[trained, 0], micro.labels_T[trained])
