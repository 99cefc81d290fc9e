"""A run from its config to its checkpoint: everything is checked before anything is started."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.adapter_source import AdapterSource, find_adapter, read_adapter
from actors.cluster import connect, device_of
from actors.console import Console
from actors.deadline import DeadlineExceededError, observed
from actors.distill import Lessons, make_lessons, run_gkd
from actors.draining import watched
from actors.ending import EndedEarlyError, Ending
from actors.engine_episode import check_template
from actors.engine_support import check_adapter_modules
from actors.env import check_one_source
from actors.lengths import check_micro_batches, check_prompts
from actors.metrics import RunRecorder, warn
from actors.model_check import CheckedModel, check_model, check_same_shape
from actors.model_source import find_model, load_tokenizer, model_size
from actors.pictures import PictureReader
from actors.placement import Bundle, Reservation, bundles_of, reserve
from actors.restart import train_on
from actors.resume import StateKeeper, forget_auto, look_for_state, rewards_of
from actors.resume_state import State
from actors.reward_swap import rows_of, sources_of, write_rewards
from actors.run_directory import make_directory
from actors.run_lock import RunLock, hold
from actors.run_result import write_early_end, write_result
from actors.stacks import describe_bundle, write_bundle
from actors.teacher import (
    Teacher,
    check_column,
    check_teacher_room,
    find_teacher,
    open_teacher,
    source_in_trainer,
)
from actors.token_texts import TokenTexts
from actors.trackers import check_trackers, sinks_of
from actors.trainer import TrainerGroup
from actors.trainer_rank import Sources
from algorithms import grpo, sft
from algorithms.conversations import Samples, make_prompts, make_sft_samples
from algorithms.data import Prompt, TrainSample
from algorithms.datasets import read_rows, read_splits
from algorithms.environments.loading import Environment, load_environment
from algorithms.prompts import PromptStream, Stream
from algorithms.rewards.loading import Reward, load_rewards
from algorithms.rewards.signature import check_arguments
from algorithms.roles import Roles
from algorithms.rows import Row
from algorithms.streaming import SampleStream, open_stream
from bridge.families import read_hf_config
from bridge.frozen import frozen_parameters, frozen_parts
from bridge.model_bridge import ModelBridge
from bridge.rules import MegatronSpec
from configs.environment import ENVIRONMENT
from configs.errors import BasculeError, ConfigError
from configs.schema import RunConfig, with_steps_of_epochs


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run that has passed every check that needs no cluster."""

    config: RunConfig
    """With the number of steps that the data tell."""
    sources: Sources
    spec: MegatronSpec
    num_parameters: int
    device: str
    bundles: tuple[Bundle, ...]
    prompts: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    samples: Samples
    stream: SampleStream | None
    """In place of all samples, where they are streamed."""
    held_out_samples: Samples
    rewards: tuple[Reward, ...]
    environment: Environment | None
    teacher: Teacher | None
    """The model that teaches, unless it is behind a URL."""
    lessons: Lessons | None
    """Of gkd."""
    state: State | None = None
    """Of a run that was cut off, which goes on after it."""


def prepare(config: RunConfig) -> Prepared:
    """Check model, layout, data and rewards. Raises BasculeError about the first thing that is wrong."""
    check_one_source()
    device = device_of(config)
    is_grpo, has_engines = config.algorithm == "grpo", config.has_engines
    if has_engines and device == "cpu" and config.bridge.transport == "cupy_nccl":
        raise ConfigError(
            "bridge.transport: cupy_nccl moves bytes from GPU to GPU; on a cpu it has to be gloo"
        )
    source = find_model(config.model.model, config.model.mcore_model, "model.model")
    policy = check_model(source, config, has_engines=has_engines)
    spec, contents = policy.spec, policy.contents
    adapter = find_adapter(config.tuner, ModelBridge(source.directory, contents.tensors), config.vision)
    sources = Sources(model=source, adapter=adapter, frozen=_frozen(config, policy, adapter))
    if has_engines and adapter is not None and config.rollout.vllm_enable_lora:
        described = read_hf_config(source.directory)
        check_adapter_modules(described, sorted(adapter.modules), device, vision=spec.vision)
    if is_grpo:
        sources = _with_reference(config, sources, policy)
    size = model_size(source, contents.tensors)
    tokenizer = load_tokenizer(source.directory)
    eye = PictureReader(source.directory, spec.vision, config.vision) if spec.vision else None
    teacher = find_teacher(config, source, eye and eye.sight)
    sources = replace(sources, teacher=source_in_trainer(config, teacher))
    lessons = make_lessons(config, tokenizer, eye) if config.algorithm == "gkd" else None
    stream = open_stream(config, tokenizer, eye) if config.data.streaming else None
    prompts, held_out, samples, held_out_samples = _read_data(config, tokenizer, lessons, eye)
    if config.algorithm == "sft":
        config = with_steps_of_epochs(config, len(samples.kept))
    rewards = load_rewards(config.rewards) if is_grpo else ()
    environment = _environment(config, rewards, tokenizer)
    packed = [*samples.kept, *held_out_samples.kept]
    packed += lessons.samples + lessons.held_out if lessons else ()
    check_prompts([*prompts, *held_out], config, spec)
    check_micro_batches(prompts, packed, config)
    check_teacher_room(config, teacher, [*prompts, *held_out], packed)
    _check_columns([*prompts, *held_out], rewards, environment)
    return Prepared(
        config=config,
        sources=sources,
        spec=spec,
        num_parameters=size.num_parameters,
        device=device,
        bundles=bundles_of(config, size, device, teacher and teacher.size),
        prompts=tuple(prompts),
        held_out=tuple(held_out),
        samples=samples,
        stream=stream,
        held_out_samples=held_out_samples,
        rewards=tuple(rewards),
        environment=environment,
        teacher=teacher,
        lessons=lessons,
    )


def _read_data(
    config: RunConfig, tokenizer: Any, lessons: Lessons | None, eye: PictureReader | None
) -> tuple[list[Prompt], list[Prompt], Samples, Samples]:
    """Prompts and samples to train on, and held-out ones after each; without those that are streamed."""
    rows: list[Row] = []
    held_out: list[Row] = []
    if config.data.streaming:
        held_out = read_rows(config.data, "eval", config.seed)
    elif lessons is None:
        rows, held_out = read_splits(config.data, config.seed)
    check_column([*rows, *held_out], config)
    if config.algorithm == "grpo":
        none = Samples(kept=(), truncated=0, dropped=0)
        prompts, others = (make_prompts(part, tokenizer, config.data, eye) for part in (rows, held_out))
        return prompts, others, none, none
    prompts = list(lessons.prompts) if lessons else []
    samples, held_out_samples = (
        make_sft_samples(part, tokenizer, config.sft, config.data, eye) for part in (rows, held_out)
    )
    return prompts, [], samples, held_out_samples


def _frozen(config: RunConfig, policy: CheckedModel, adapter: AdapterSource | None) -> frozenset[str]:
    """Global names of the parameters that are not trained; with an adapter the model is not trained anyway."""
    named = frozen_parameters(policy.family, policy.spec, policy.contents.tensors, config.trainer.freeze)
    return named if adapter is not None else named | frozen_parts(policy.spec, config.vision)


def _check_columns(
    prompts: Sequence[Prompt], rewards: Sequence[Reward], environment: Environment | None
) -> None:
    """Raises ConfigError for an argument that no row has. Rows of the same columns are checked once."""
    for columns in {frozenset(prompt.columns) for prompt in prompts}:
        for reward in rewards:
            check_arguments(reward.signature, reward.config.spelled, columns)
        if environment is not None:
            environment.check_columns(columns)


def _environment(config: RunConfig, rewards: Sequence[Reward], tokenizer: Any) -> Environment | None:
    """The run's environment, loaded here for its checks alone. Raises ConfigError."""
    if config.environment.function is None:
        return None
    if any(reward.name == ENVIRONMENT for reward in rewards):
        raise ConfigError(
            f"rewards: {ENVIRONMENT} is what the environment's own rewards are called; give the reward of that "
            "name another `name`"
        )
    check_template(tokenizer, config.environment.role)
    return load_environment(config.environment)


def _with_reference(config: RunConfig, sources: Sources, policy: CheckedModel) -> Sources:
    """With the reference, if the run has one of its own; it must be able to score the policy's tokens."""
    model, ref_adapters = config.model, config.tuner.ref_adapters
    given = model.ref_model is not None or model.mcore_ref_model is not None
    if config.grpo.beta == 0:
        unused = "model.ref_model" if given else "tuner.ref_adapters" if ref_adapters is not None else None
        if unused:
            raise ConfigError(f"{unused}: is not used while grpo.beta is 0; set beta or leave it out")
        return sources
    # The model without its adapters is there already, unless more than adapters is trained.
    if sources.adapter is not None and not (given or ref_adapters or config.tuner.modules_to_save):
        return sources
    source, checked = sources.model, policy
    if given:
        source = find_model(model.ref_model, model.mcore_ref_model, "model.ref_model")
        checked = check_model(source, config, has_engines=False)
        if checked.spec.vocab_size != policy.spec.vocab_size:
            raise ConfigError(
                f"model.ref_model: {source.directory} has {checked.spec.vocab_size} tokens in its "
                f"vocabulary, the model {policy.spec.vocab_size}"
            )
        if config.grpo.sync_ref_model:
            check_same_shape(checked.spec, policy.spec, source.directory)
    adapter = None
    if ref_adapters is not None:
        base = ModelBridge(source.directory, checked.contents.tensors)
        adapter = read_adapter(ref_adapters, base, "tuner.ref_adapters")
    return replace(sources, reference=source, reference_adapter=adapter)


def run(config: RunConfig, console: Console) -> dict[str, Any]:
    """Train as the config says; returns what `result.json` holds.

    Raises BasculeError with one clear message; by then every process of the run is gone.
    """
    started = time.monotonic()
    check_trackers(config.record)
    prepared = prepare(config)
    config = prepared.config
    with hold(config.output_dir.resolve()) as lock:
        return _run(prepared, lock, started, console)


def _run(prepared: Prepared, lock: RunLock, started: float, console: Console) -> dict[str, Any]:
    config = prepared.config
    prepared = replace(prepared, state=look_for_state(config, config.output_dir.resolve(), console))
    directory = make_directory(config, prepared.sources, resumes=prepared.state is not None)
    console.line(f"run directory: {directory}")
    texts = TokenTexts(prepared.sources.model.directory)
    recorder = RunRecorder(
        *(directory, config.max_steps, console),
        algorithm=config.algorithm,
        token_texts=texts,
        state=prepared.state,
        sinks=sinks_of(config, directory),
        trace_steps=config.record.trace_steps,
    )
    try:
        with Ending(config, console, started) as ending:
            _start_and_train(prepared, recorder, lock, directory, ending, console)
    except EndedEarlyError as error:
        write_early_end(directory, recorder, error)
        raise
    if recorder.swapped:
        console.line("rewards were replaced meanwhile: accuracies may be of different ones, see events.jsonl")
    result = write_result(directory, recorder, seconds=time.monotonic() - started)
    forget_auto(config, directory)
    return result


def _start_and_train(
    prepared: Prepared,
    recorder: RunRecorder,
    lock: RunLock,
    directory: Path,
    ending: Ending,
    console: Console,
) -> None:
    config = prepared.config
    train = {"grpo": _run_grpo, "gkd": run_gkd, "sft": _run_sft}[config.algorithm]
    try:
        with connect(config.cluster) as cluster:
            # Ray has put a handler of its own in place of ours.
            ending.install()
            lock.tell_address(cluster.address, cluster.job, wants_token=cluster.wants_token)
            try:
                reservation = reserve(
                    prepared.bundles,
                    timeout_s=config.cluster.placement_timeout_s,
                    can_grow=not cluster.local,
                    node_label=None if cluster.local else config.cluster.node_label,
                )
                with watched(reservation, ending), observed(recorder.waiting):
                    train(config, prepared, reservation, recorder, directory, console, ending)
            except EndedEarlyError:
                raise
            except BasculeError as error:
                if isinstance(error, DeadlineExceededError):
                    console.line(describe_bundle(write_bundle(directory, error)))
                console.line(f"what the actors printed is in {cluster.logs}")
                raise
    except KeyboardInterrupt:
        if ending.reason is None or ending.at_once:
            raise
        # Told to end before its first step.
        step = 0 if prepared.state is None else prepared.state.step
        raise EndedEarlyError(ending.reason, step, step or None) from None


def _run_grpo(
    config: RunConfig,
    prepared: Prepared,
    reservation: Reservation,
    recorder: RunRecorder,
    directory: Path,
    console: Console,
    ending: Ending,
) -> None:
    from actors.environment_worker import create_environment
    from actors.launch import launch
    from actors.reward_worker import SwappableRewards, create_reward_group

    start = time.monotonic()
    probe = prepared.prompts[0]
    with (
        open_teacher(config, prepared.teacher, reservation, recorder.event) as asked,
        launch(
            *(config, prepared.sources, prepared.device, reservation, directory, console),
            probe=probe,
            event=recorder.event,
        ) as actors,
    ):
        write_rewards(directory, config.rewards)
        judge = create_reward_group(config, reservation.group, reservation.indices("reward"))
        actors.engines.heard_by(judge.worker_for)
        environment = None
        if prepared.environment is not None:
            environment = create_environment(config, reservation)
            actors.engines.play_with(environment.worker_for)
        asked.ready(config.cluster.start_timeout_s)
        console.line(f"trainers, engines and bridge are up after {time.monotonic() - start:.1f}s")
        swappable = SwappableRewards(judge, directory, recorder.event, config.cluster.start_timeout_s)
        replaced = rewards_of(prepared.state, config)
        if replaced is not None:
            swappable.restore(sources_of(replaced))
        roles = Roles(
            trainer=actors.trainers,
            sampler=actors.engines,
            judge=swappable,
            weights=actors.weights,
            recorder=recorder,
            teacher=asked.teacher,
        )
        prompts = PromptStream(prepared.prompts, seed=config.seed, shuffle=config.data.shuffle)
        recorder.watch(actors.tracks, judge.tracks, asked.tracks, numbers=actors.engines.load)
        keeper = StateKeeper(
            *(config, directory, actors.trainers, recorder, {"prompts": prompts}, prepared.state, ending),
            rewards=lambda: None if swappable.replaced is None else rows_of(swappable.replaced),
        )
        with recorder, keeper:
            train_on(
                lambda: grpo.train(config, roles, prompts, prepared.held_out, keeper),
                *(config, actors.trainers, keeper, recorder),
                reconnect=actors.reconnect,
            )
    actors.trainers.save_last()
    judge.close()
    if environment is not None:
        environment.close()


def _run_sft(
    config: RunConfig,
    prepared: Prepared,
    reservation: Reservation,
    recorder: RunRecorder,
    directory: Path,
    console: Console,
    ending: Ending,
) -> None:
    start = time.monotonic()
    sources, event = prepared.sources, recorder.event
    trainers = TrainerGroup(config, reservation, prepared.device, sources, directory, event)
    warn(trainers.warnings, console)
    console.line(f"trainers are up after {time.monotonic() - start:.1f}s")
    if prepared.samples.truncated or prepared.samples.dropped:
        console.line(f"data: {prepared.samples.describe()}")
    samples: Stream[TrainSample] = prepared.stream or PromptStream(
        prepared.samples.kept, seed=config.seed, shuffle=config.data.shuffle
    )
    recorder.watch(trainers.tracks)
    keeper = StateKeeper(config, directory, trainers, recorder, {"samples": samples}, prepared.state, ending)
    with recorder, keeper:
        held_out = prepared.held_out_samples.kept
        train_on(
            lambda: sft.train(config, trainers, samples, held_out, recorder, keeper),
            *(config, trainers, keeper, recorder),
        )
    if prepared.stream is not None:
        console.line(f"data: {prepared.stream.describe()}")
    trainers.save_last()
