"""A vLLM engine as a Ray actor."""

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, NoReturn

from actors.engine_completion import joined, piece_params
from actors.engine_episode import Player, episode
from actors.engine_scoring import rows_of, scoring_params, top_tokens
from actors.engine_vision import Eyes, Shown, engine_input
from actors.engine_watch import LOOK_S, EngineWatch
from actors.heavy_imports import uncollected
from actors.spans import SpanLog, Taken, traced
from algorithms.data import FloatRow, Group, IntRow, Prompt, Rollout, SamplingSettings, TopTokens, Vision
from algorithms.environments.calling import EnvironmentFailedError
from bridge.progress import EngineProgress
from configs.errors import BasculeError, ConfigError
from configs.schema import RunConfig

LOG = logging.getLogger(__name__)

PauseMode = Literal["keep", "abort"]


class EngineError(BasculeError):
    """An engine could not do what it was asked. Names the engine, and the prompt or weight version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """State of one engine: its processes, its weights and its load."""

    name: str
    pid: int
    child_pids: tuple[int, ...]
    """vLLM's core first, then its workers by rank where there are several."""
    version: int
    failed_sync: str | None
    """Why the weights are not usable, or None."""
    paused: bool
    in_flight: int
    """Prompts that are being completed."""


@dataclass(kw_only=True, slots=True)
class _Request:
    """A prompt that is being completed."""

    name: str
    prompt: Prompt
    shown: Shown | None
    sampling: SamplingSettings
    unfinished: int
    aborted: bool = False

    def name_of(self, index: int) -> str:
        """What vLLM calls the completion with this index."""
        return f"{self.name}-{index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """A completion, or one turn of an episode: `prompt` has the tokens before it."""

    prompt: Prompt
    sampling: SamplingSettings
    index: int


class Engine:
    """One vLLM engine, as an async Ray actor. Its processes, core and workers, end with the actor.

    With `enable_lora` among its arguments (actors.engine_settings) it samples with the adapter that it was sent
    last, before that with the base model.
    """

    def __init__(
        self, name: str, config: RunConfig, arguments: Mapping[str, Any], heartbeat_timeout_s: float
    ) -> None:
        """It is lost when its core is silent for `heartbeat_timeout_s`."""
        self.spans = SpanLog()
        self._name = name
        self._config = config
        self._arguments = dict(arguments)
        self._lora_request: Any = None
        self._llm: Any = None
        self._version = 0
        self._failed_sync: str | None = None
        self._watch = EngineWatch(heartbeat_timeout_s)
        self._running = asyncio.Event()
        self._cuts = 0
        self._requests = 0
        self._in_flight: dict[str, _Request] = {}

    async def start(self) -> float:
        """Load the model as weight version 0; returns the seconds it took. Raises EngineError."""
        began = time.monotonic()
        # The only way by which vLLM's processes learn of our transport.
        if not entry_points(group="vllm.general_plugins", name="bascule"):
            raise EngineError(
                f"{self._name}: this project is not installed in {sys.prefix}; its dependencies alone are not "
                "enough: run `pip install --no-deps -e .` there"
            )
        with uncollected():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

        try:
            self._eyes = Eyes(Path(self._arguments["model"]), self._config.vision)
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments))
            await self._llm.update_weight_version(str(self._version))
            await self._watch.begin(self._llm)
            await self._start_adapter()
            # It is asked for once, and no prompt is to wait for it.
            await self._llm.get_supported_tasks()
        except Exception as error:
            raise EngineError(
                f"{self._name}: vLLM did not start with {self._arguments['model']}: {error!r}; "
                "the cause is in the engine's log"
            ) from error
        self._running.set()
        return time.monotonic() - began

    async def watch(self) -> NoReturn:
        """Look after vLLM's processes, also while nothing is asked of them; does not return.

        Raises EngineError naming the process within about a second of its end, and a core that gives no answer
        for rollout.heartbeat_timeout_s.
        """
        raise self._error(await self._watch.what_is_wrong())

    async def progress(self) -> EngineProgress:
        """How far the engine is in a weight sync. Answers while weights are received."""
        return self._watch.progress()

    async def take_spans(self) -> Taken:
        """What it has done since the last call."""
        return self.spans.take()

    @traced("generate", prompt=lambda prompt, *_: prompt.id)
    async def generate(
        self, prompt: Prompt, sampling: SamplingSettings, listener: Any = None, environment: Any = None
    ) -> Group:
        """`sampling.n` completions; an aborted one has what it got so far. Waits while the engine is paused.

        A `listener` is an actor that hears of each completion as soon as it is there (RewardWorker.hear). With an
        `environment`, an actor (EnvironmentWorker.step), completions are episodes. Raises EngineError when prompt
        and completion do not fit into the model's length, when the last weight update failed, or when vLLM fails;
        EnvironmentFailedError.
        """
        self._require_good_weights(f"prompt {prompt.id}")
        limit = self._llm.model_config.max_model_len
        if len(prompt.tokens) + sampling.max_tokens > limit:
            raise EngineError(
                f"prompt {prompt.id}: {len(prompt.tokens)} tokens and max_completion_length "
                f"{sampling.max_tokens} exceed the engine's max_model_len {limit}"
            )
        self._requests += 1
        name = f"{self._requests}-{prompt.id}"
        shown = await self._eyes.see(prompt.vision, f"prompt {prompt.id}")
        request = _Request(name=name, prompt=prompt, shown=shown, sampling=sampling, unfinished=sampling.n)
        self._in_flight[request.name] = request
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._complete(request, index, listener, environment))
                    for index in range(sampling.n)
                ]
        except ExceptionGroup as errors:
            raise self._failure(f"prompt {prompt.id}", errors.exceptions[0]) from errors.exceptions[0]
        finally:
            del self._in_flight[request.name]
        return Group(prompt=prompt, rollouts=tuple(task.result() for task in tasks))

    @traced("score tokens")
    async def score(self, tokens: Sequence[int], vision: Vision | None = None) -> list[float]:
        """Log-probability of each token but the first given those before it, by the model at temperature 1.

        Takes one token less than the model's length. Raises EngineError as `generate` does.
        """
        _, logprobs = await self._scored(tokens, 0, vision)
        return logprobs[:, 0].tolist()

    @traced("top tokens")
    async def top_tokens(self, tokens: Sequence[int], k: int, vision: Vision | None = None) -> TopTokens:
        """The model's k likeliest tokens in place of each token, at temperature 1, the likeliest first.

        Takes one token less than the model's length. Raises EngineError as `generate` does.
        """
        return top_tokens(*await self._scored(tokens, k, vision))

    async def _scored(self, tokens: Sequence[int], k: int, vision: Vision | None) -> tuple[IntRow, FloatRow]:
        self._require_good_weights("a sequence to score")
        row = engine_input(
            [int(token) for token in tokens], await self._eyes.see(vision, "a sequence to score")
        )
        params = scoring_params(k)
        self._requests += 1
        name = f"{self._requests}-score"
        answers: list[Any] = []
        try:
            # One that a pause aborted is asked for again.
            while not answers or answers[-1].outputs[0].finish_reason == "abort":
                await self._unpaused()
                answers += [
                    answer
                    async for answer in self._llm.generate(row, params, name, lora_request=self._lora_request)
                ]
        except Exception as error:
            raise self._failure(f"{len(tokens)} tokens to score", error) from error
        return rows_of(answers[-1].prompt_logprobs, k)

    async def abort_all(self) -> int:
        """End all completions now: each `generate` returns what there is. Returns the number of prompts."""
        requests = list(self._in_flight.values())
        for request in requests:
            request.aborted = True
        names = [request.name_of(index) for request in requests for index in range(request.sampling.n)]
        await self._llm.abort(names)
        return len(requests)

    async def init_weights(self, init_info: Mapping[str, Any]) -> None:
        """Join the sender's group; returns once all its ranks are there.

        Raises EngineError, also when the adapter that is to be sent does not fit the model.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        board = self._watch.new_board(self._config.rollout.tensor_parallel_size)
        request = WeightTransferInitRequest(init_info={**init_info, "progress": board})
        try:
            with self._watch.syncing("join"):
                await self._llm.init_weight_transfer_engine(request)
        except Exception as error:
            raise EngineError(f"{self._name}: weights cannot be received: {error}") from error

    @traced("pause")
    async def pause(self, mode: PauseMode = "keep") -> int:
        """Stop between two tokens; returns how many completions are in flight.

        `keep`: vLLM holds them, and goes on after `resume` with new weights. `abort`: vLLM gives them back
        with what they have, and after `resume` each is asked for again from there; nobody sees that but in
        `Rollout.versions`. Raises EngineError when vLLM fails.
        """
        self._running.clear()
        self._cuts += mode == "abort"
        try:
            await self._llm.pause_generation(mode=mode, clear_cache=True)
        except Exception as error:
            raise self._failure("pause", error) from error
        return sum(request.unfinished for request in self._in_flight.values())

    @traced("receive weights", version=lambda version: version)
    async def receive(self, version: int) -> float:
        """Take one full set of weights from the sender; returns the seconds it took.

        Raises EngineError naming what failed; the engine then refuses to sample until a later call succeeds
        (after a new `init_weights`, because a failure closes the group).
        """
        if self._running.is_set():
            raise EngineError(f"{self._name}: weights of version {version} came without a pause")
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        began = time.monotonic()
        try:
            with self._watch.syncing("begin of the update"):
                await self._llm.start_weight_update()
            with self._watch.syncing("update"):
                await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"version": version}))
            with self._watch.syncing("end of the update"):
                await self._llm.finish_weight_update(str(version))
                if self._lora_request is not None:
                    await self._llm.collective_rpc("activate_adapter")
        except Exception as error:
            self._failed_sync = f"the update to weight version {version} failed: {error}"
            raise EngineError(f"{self._name}: {self._failed_sync}") from error
        self._version = version
        self._failed_sync = None
        return time.monotonic() - began

    async def resume(self) -> None:
        """Go on sampling.

        Raises EngineError while the weights are those of a failed update, or when vLLM fails.
        """
        if self._failed_sync is not None:
            raise EngineError(f"{self._name}: stays paused: {self._failed_sync}")
        try:
            # An update does not do it: cached prefixes were computed by the old weights.
            if not await self._llm.reset_prefix_cache(reset_running_requests=True):
                raise EngineError(f"{self._name}: stays paused: vLLM did not drop its prefix cache")
            if self._eyes.are_there:
                await self._llm.reset_encoder_cache()
            await self._llm.resume_generation()
        except Exception as error:
            raise self._failure("resume", error) from error
        self._running.set()

    async def info(self) -> EngineInfo:
        """The engine's state. Answers while weights are received."""
        return EngineInfo(
            name=self._name,
            pid=os.getpid(),
            child_pids=self._watch.processes.pids,
            version=self._version,
            failed_sync=self._failed_sync,
            paused=not self._running.is_set(),
            in_flight=len(self._in_flight),
        )

    async def stop(self) -> None:
        """End vLLM's processes."""
        self._llm.shutdown()

    async def _start_adapter(self) -> None:
        """Have an adapter that changes nothing, so that what is in flight over the first sync has a later one."""
        if not self._arguments.get("enable_lora"):
            return
        from bridge.transport.lora_loading import adapter_request

        await self._llm.collective_rpc("activate_adapter")
        self._lora_request = adapter_request()

    async def _complete(self, request: _Request, index: int, listener: Any, environment: Any) -> Rollout:
        prompt, sampling = request.prompt, request.sampling

        async def sample(prompt: Prompt, sampling: SamplingSettings) -> Rollout:
            return await self._turn(request, _Turn(prompt=prompt, sampling=sampling, index=index))

        if environment is None:
            rollout = await sample(prompt, sampling)
        else:
            async with episode(environment, prompt, self._config) as ask:
                player = Player(tokenizer=self._llm.tokenizer, config=self._config.environment, ask=ask)
                rollout = await player.play(prompt, sampling, sample)
        request.unfinished -= 1
        if listener is not None:
            # Not waited for, and of no consequence when it is lost: the group is scored all the same.
            listener.hear.remote(prompt, rollout, index)
        return rollout

    async def _turn(self, request: _Request, turn: _Turn) -> Rollout:
        pieces: list[Any] = []
        while True:
            await self._unpaused(request)
            if request.aborted:
                break
            cuts = self._cuts
            pieces.append(await self._sample(request, turn, pieces))
            if pieces[-1].finish_reason != "abort" or cuts == self._cuts:
                break
        if pieces and pieces[-1].finish_reason not in ("stop", "length", "abort"):
            raise EngineError(f"{self._name}: vLLM ended a completion with {pieces[-1].finish_reason!r}")
        return joined(pieces, turn.prompt, turn.sampling, self._llm.tokenizer, self._version)

    async def _sample(self, request: _Request, turn: _Turn, before: Sequence[Any]) -> Any:
        """What vLLM completes of one turn, up to a pause that aborts it."""
        tokens = [*turn.prompt.tokens.tolist(), *(token for piece in before for token in piece.token_ids)]
        params = piece_params(turn.sampling, turn.index, before)
        output: Any = None
        name, lora = request.name_of(turn.index), self._lora_request
        row = engine_input(tokens, request.shown)
        async for answer in self._llm.generate(row, params, name, lora_request=lora):
            (output,) = answer.outputs
        return output

    async def _unpaused(self, request: _Request | None = None) -> None:
        """Return once the engine is not paused, or the request is aborted. Raises EngineError."""
        while not self._running.is_set() and not (request and request.aborted):
            lost = self._watch.lost()
            if lost is not None:
                raise self._error(lost)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._running.wait(), LOOK_S)

    def _error(self, reason: str) -> EngineError:
        return EngineError(f"{self._name}: {reason}; the cause is in the engine's log")

    def _failure(self, what: str, error: Exception) -> BasculeError:
        if isinstance(error, EngineError | EnvironmentFailedError | ConfigError):
            return error
        return EngineError(
            f"{self._name}: {what}: vLLM failed: {self._watch.processes.lost() or repr(error)}"
        )

    def _require_good_weights(self, what: str) -> None:
        if self._failed_sync is not None:
            raise EngineError(
                f"{self._name}: {what} refused: {self._failed_sync}; "
                "weights must be sent again before it samples"
            )
