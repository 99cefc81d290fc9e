"""A run of gkd: its data and its actors."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actors.console import Console
from actors.ending import Ending
from actors.metrics import RunRecorder, warn
from actors.placement import Reservation
from actors.restart import train_on
from actors.resume import StateKeeper
from actors.teacher import check_column, open_teacher
from actors.trainer import TrainerGroup
from algorithms import gkd
from algorithms.completions import teacher_of
from algorithms.conversations import make_prompts, make_sft_samples
from algorithms.data import Prompt, TrainSample
from algorithms.datasets import Row, read_rows, read_splits
from algorithms.prompts import HasTokens, PromptStream
from algorithms.vision import Eye
from configs.schema import RunConfig

if TYPE_CHECKING:
    from actors.run import Prepared


T = TypeVar("T", bound=HasTokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """What a run of gkd trains on."""

    prompts: tuple[Prompt, ...]
    """For on-policy steps."""
    samples: tuple[TrainSample, ...]
    """For the others."""
    held_out: tuple[TrainSample, ...]


def make_lessons(config: RunConfig, tokenizer: Any, eye: Eye | None = None) -> Lessons:
    """Prompts where there are on-policy steps, samples where there are others; held-out samples.

    Raises ConfigError naming the row that is of no use.
    """
    data, settings = config.data, config.gkd
    # What a generated dataset holds out unasked has no completions to evaluate on.
    has_held_out = bool(data.eval_dataset) or data.split_dataset_ratio > 0
    rows, held_out = (
        read_splits(data, config.seed) if has_held_out else (read_rows(data, "train", config.seed), [])
    )

    def to_samples(rows: Sequence[Row]) -> tuple[TrainSample, ...]:
        names = [teacher_of(row.columns, config) for row in rows]
        return tuple(
            replace(sample, teacher=name)
            for name in dict.fromkeys(names)
            for sample in make_sft_samples(
                [row for row, its in zip(rows, names, strict=True) if its == name],
                tokenizer,
                config.sft,
                data,
                eye,
            ).kept
        )

    check_column([*rows, *held_out], config)
    prompts: list[Prompt] = []
    if config.has_engines or settings.seq_kd:
        prompts = make_prompts([without_answer(row) for row in rows], tokenizer, data, eye)
    return Lessons(
        prompts=tuple(prompts),
        samples=to_samples(rows) if settings.lmbda < 1 and not settings.seq_kd else (),
        held_out=to_samples(held_out),
    )


def without_answer(row: Row) -> Row:
    """The row without its final assistant message: what the student is to answer."""
    messages = row.columns.get("messages")
    if not messages or messages[-1]["role"] != "assistant":
        return row
    return replace(row, columns={**row.columns, "messages": messages[:-1]})


def describe_lessons(config: RunConfig, lessons: Lessons) -> list[str]:
    """The data and the steps, line by line."""
    settings = config.gkd
    others = ", the others of the teacher" if settings.seq_kd else ""
    return [
        f"data: {len(lessons.prompts)} prompts, {len(lessons.samples)} samples, {len(lessons.held_out)} held out",
        f"step: {settings.batch_size} samples, on-policy with probability {settings.lmbda:g}{others}; beta "
        f"{settings.beta:g}",
    ]


def run_gkd(
    config: RunConfig,
    prepared: "Prepared",
    reservation: Reservation,
    recorder: RunRecorder,
    directory: Path,
    console: Console,
    ending: Ending,
) -> None:
    """Train, and save the last checkpoint. Engines are started only where there are on-policy steps."""
    start = time.monotonic()
    lessons = prepared.lessons
    assert lessons is not None, "prepared for gkd"

    with open_teacher(config, prepared.teacher, reservation, recorder.event) as asked:

        def train(
            trainers: TrainerGroup,
            student: gkd.Student | None,
            reconnect: Callable[[], None] = lambda: None,
        ) -> None:
            asked.ready(config.cluster.start_timeout_s)
            recorder.watch(asked.tracks)
            console.line(f"the actors are up after {time.monotonic() - start:.1f}s")
            roles = gkd.Roles(
                trainer=trainers,
                student=student,
                teacher=asked.teacher,
                writer=asked.engines if config.gkd.seq_kd else None,
                recorder=recorder,
            )
            prompts, samples = _stream(config, lessons.prompts), _stream(config, lessons.samples)
            streams = {"prompts": prompts, "samples": samples}
            keeper = StateKeeper(config, directory, trainers, recorder, streams, prepared.state, ending)
            with recorder, keeper:
                train_on(
                    lambda: gkd.train(config, roles, prompts, samples, lessons.held_out, keeper),
                    *(config, trainers, keeper, recorder),
                    reconnect=reconnect,
                )

        _start(config, prepared, reservation, recorder, directory, console, train)


def _start(
    config: RunConfig,
    prepared: "Prepared",
    reservation: Reservation,
    recorder: RunRecorder,
    directory: Path,
    console: Console,
    train: Callable[..., None],
) -> None:
    """Let `train` have the trainers, and the student's engines if it has any; then save the last checkpoint."""
    from actors.launch import launch

    sources, device, lessons = prepared.sources, prepared.device, prepared.lessons
    if config.has_engines:
        assert lessons is not None, "prepared for gkd"
        probe = lessons.prompts[0]
        with launch(
            *(config, sources, device, reservation, directory, console), probe=probe, event=recorder.event
        ) as actors:
            student = gkd.Student(sampler=actors.engines, weights=actors.weights)
            recorder.watch(actors.tracks, numbers=actors.engines.load)
            train(actors.trainers, student, actors.reconnect)
        actors.trainers.save_last()
    else:
        trainers = TrainerGroup(config, reservation, device, sources, directory, recorder.event)
        warn(trainers.warnings, console)
        recorder.watch(trainers.tracks)
        train(trainers, None)
        trainers.save_last()


def _stream(config: RunConfig, items: Sequence[T]) -> PromptStream[T] | None:
    return PromptStream(items, seed=config.seed, shuffle=config.data.shuffle) if items else None
