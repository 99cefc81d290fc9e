"""A run of gkd: its teacher, its data, and its actors."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actors.console import Console
from actors.ending import Ending
from actors.metrics import RunRecorder, warn
from actors.model_check import check_model
from actors.model_source import ModelSize, ModelSource, find_model, load_tokenizer, model_size
from actors.placement import Reservation
from actors.restart import train_on
from actors.resume import StateKeeper
from actors.teacher_server import TeacherServers
from actors.trainer import TrainerGroup
from actors.trainer_rank import Sources
from algorithms import gkd
from algorithms.conversations import make_prompts, make_sft_samples
from algorithms.data import Prompt, TrainSample
from algorithms.datasets import Row, read_rows, read_splits
from algorithms.prompts import PromptStream
from configs.errors import ConfigError
from configs.schema import RunConfig

if TYPE_CHECKING:
    from actors.run import Prepared


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """What a run of gkd trains on."""

    prompts: tuple[Prompt, ...]
    """For on-policy steps."""
    samples: tuple[TrainSample, ...]
    """For the others."""
    held_out: tuple[TrainSample, ...]


def find_teacher(
    config: RunConfig, student: ModelSource
) -> tuple[ModelSource, ModelSize] | tuple[None, None]:
    """The Megatron teacher, if it is one, and how much it is.

    Raises ConfigError when it does not fit the student's layout, or has not its tokenizer.
    """
    if config.gkd.servers:
        return None, None
    source = find_model(config.model.teacher_model, config.model.mcore_teacher_model, "model.teacher_model")
    contents = check_model(source, config, has_engines=False).contents
    check_same_tokens(load_tokenizer(student.directory), load_tokenizer(source.directory), source.directory)
    return source, model_size(source, contents.tensors)


def find_servers(config: RunConfig) -> TeacherServers | None:
    """The teachers that are asked by URL, if they are. Raises ConfigError when one does not answer."""
    settings = config.gkd
    if not settings.servers:
        return None
    assert settings.gkd_logits_topk is not None, "checked with the config"
    return TeacherServers(
        settings.servers,
        settings.gkd_logits_topk,
        timeout_s=settings.teacher_timeout_s,
        retries=settings.teacher_retries,
    )


def check_same_tokens(student: Any, teacher: Any, teacher_directory: Path) -> None:
    """Raises ConfigError unless both tokenizers have the same ids for the same tokens."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    other = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if other:
        token = other[0]
        raise ConfigError(
            f"model.teacher_model: the tokenizer of {teacher_directory} is not the student's: {len(other)} tokens "
            f"differ, for example {token!r}, which is {_number(ours.get(token))} for the student and "
            f"{_number(theirs.get(token))} for the teacher; a teacher has to have the student's tokenizer"
        )


def _number(token_id: int | None) -> str:
    return "unknown" if token_id is None else f"number {token_id}"


def make_lessons(config: RunConfig, tokenizer: Any) -> Lessons:
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
        names = [gkd.teacher_of(row.columns, config) for row in rows]
        return tuple(
            replace(sample, teacher=name)
            for name in dict.fromkeys(names)
            for sample in make_sft_samples(
                [row for row, its in zip(rows, names, strict=True) if its == name],
                tokenizer,
                config.sft,
                data,
            ).kept
        )

    for row in [*rows, *held_out]:
        _check_teacher(row, config)

    prompts: list[Prompt] = []
    if config.has_engines:
        prompts = make_prompts([without_answer(row) for row in rows], tokenizer, data)
    return Lessons(
        prompts=tuple(prompts),
        samples=to_samples(rows) if settings.lmbda < 1 else (),
        held_out=to_samples(held_out),
    )


def _check_teacher(row: Row, config: RunConfig) -> None:
    column, servers = config.gkd.teacher_column, config.gkd.teacher_model_servers
    if column is not None and str(row.columns.get(column)) not in servers:
        raise ConfigError(
            f"{row.place}: gkd.teacher_column {column} is {row.columns.get(column)!r} here; "
            f"gkd.teacher_model_servers has {', '.join(servers)}"
        )


def without_answer(row: Row) -> Row:
    """The row without its final assistant message: what the student is to answer."""
    messages = row.columns.get("messages")
    if not messages or messages[-1]["role"] != "assistant":
        return row
    return replace(row, columns={**row.columns, "messages": messages[:-1]})


def describe_lessons(config: RunConfig, sources: Sources, lessons: Lessons) -> list[str]:
    """The teacher and the data, line by line."""
    teacher, settings = sources.teacher, config.gkd
    servers = ", ".join(settings.servers.values())
    place = f"{teacher.mcore or teacher.directory}, in the trainer ranks" if teacher else f"at {servers}"
    tokens = "whole vocabulary" if settings.gkd_logits_topk is None else f"{settings.gkd_logits_topk} tokens"
    return [
        f"teacher: {place}, {tokens}",
        f"data: {len(lessons.prompts)} prompts, {len(lessons.samples)} samples, {len(lessons.held_out)} held out",
        f"step: {settings.batch_size} samples, on-policy with probability {settings.lmbda:g}; beta "
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
    from actors.launch import launch

    start = time.monotonic()
    lessons = prepared.lessons
    assert lessons is not None, "prepared for gkd"

    teacher = find_servers(config)

    def train(
        trainers: TrainerGroup, student: gkd.Student | None, reconnect: Callable[[], None] = lambda: None
    ) -> None:
        console.line(f"the actors are up after {time.monotonic() - start:.1f}s")
        roles = gkd.Roles(trainer=trainers, student=student, teacher=teacher, recorder=recorder)
        prompts, samples = _stream(config, lessons.prompts), _stream(config, lessons.samples)
        streams = {"prompts": prompts, "samples": samples}
        keeper = StateKeeper(config, directory, trainers, recorder, streams, prepared.state, ending)
        with recorder, keeper:
            train_on(
                lambda: gkd.train(config, roles, prompts, samples, lessons.held_out, keeper),
                *(config, trainers, keeper, recorder),
                reconnect=reconnect,
            )

    sources, device = prepared.sources, prepared.device
    if config.has_engines:
        probe = lessons.prompts[0].tokens.tolist()
        with launch(
            *(config, sources, device, reservation, directory, console), probe=probe, event=recorder.event
        ) as actors:
            student = gkd.Student(sampler=actors.engines, weights=actors.weights)
            train(actors.trainers, student, actors.reconnect)
        actors.trainers.save_last()
    else:
        trainers = TrainerGroup(config, reservation, device, sources, directory, recorder.event)
        warn(trainers.warnings, console)
        train(trainers, None)
        trainers.save_last()


def _stream(config: RunConfig, items: Sequence[T]) -> PromptStream[T] | None:
    return PromptStream(items, seed=config.seed, shuffle=config.data.shuffle) if items else None
