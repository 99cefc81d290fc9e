"""vLLM engines as Ray actors, and the group of them that samples for the training loop."""

import logging
import multiprocessing
import os
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from algorithms.data import Finish, Group, Prompt, Rollout, SamplingSettings, float_row, int_row
from bridge.transport.registry import OWNED_ENGINE
from configs.errors import BasculeError
from configs.schema import RolloutConfig, RunConfig

LOG = logging.getLogger(__name__)


class EngineError(BasculeError):
    """An engine could not do what it was asked. Names the engine, and the prompt or weight version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """State of one engine: its processes, its weights and its load."""

    name: str
    pid: int
    child_pids: tuple[int, ...]
    version: int
    failed_sync: str | None
    """Why the weights are not usable, or None."""
    paused: bool
    in_flight: int
    """Prompts that are being completed."""


class Engine:
    """One vLLM engine, as an async Ray actor. Its core runs in a child process that ends with the actor."""

    def __init__(
        self, name: str, model_path: str, config: RunConfig, device: str, with_weights: bool = True
    ) -> None:
        self._load_format = "auto" if with_weights else "dummy"
        self._name = name
        self._model_path = model_path
        self._config = config
        self._device = device
        self._llm: Any = None
        self._version = 0
        self._failed_sync: str | None = None
        self._paused = False
        self._requests = 0
        self._in_flight: set[str] = set()

    async def start(self) -> float:
        """Load the model as weight version 0; returns the seconds it took. Raises EngineError."""
        began = time.monotonic()
        # The only way by which vLLM's processes learn of our transport.
        if not entry_points(group="vllm.general_plugins", name="bascule"):
            raise EngineError(
                f"{self._name}: this project is not installed in {sys.prefix}; its dependencies alone are not "
                "enough: run `pip install --no-deps -e .` there"
            )
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(self._config, self._model_path, self._device)
        arguments["load_format"] = self._load_format
        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
            await self._llm.update_weight_version(str(self._version))
        except Exception as error:
            raise EngineError(
                f"{self._name}: vLLM did not start with {self._model_path}: {error!r}; "
                "the cause is in the engine's log"
            ) from error
        return time.monotonic() - began

    async def generate(self, prompt: Prompt, sampling: SamplingSettings) -> Group:
        """`sampling.n` completions; an aborted one has what it got so far.

        Raises EngineError when prompt and completion do not fit into the model's length, when the last
        weight update failed, or when vLLM fails.
        """
        if self._failed_sync is not None:
            raise EngineError(
                f"{self._name}: prompt {prompt.id} refused: {self._failed_sync}; "
                "weights must be sent again before it samples"
            )
        limit = self._llm.model_config.max_model_len
        if len(prompt.tokens) + sampling.max_tokens > limit:
            raise EngineError(
                f"prompt {prompt.id}: {len(prompt.tokens)} tokens and max_completion_length "
                f"{sampling.max_tokens} exceed the engine's max_model_len {limit}"
            )
        self._requests += 1
        request = f"{self._requests}-{prompt.id}"
        self._in_flight.add(request)
        try:
            outputs = await self._complete(request, prompt, sampling)
        except Exception as error:
            raise EngineError(f"{self._name}: prompt {prompt.id}: vLLM failed: {error!r}") from error
        finally:
            self._in_flight.discard(request)
        return Group(prompt=prompt, rollouts=tuple(self._rollout(output) for output in outputs))

    async def abort_all(self) -> int:
        """End all completions now: each `generate` returns what there is. Returns the number of prompts."""
        requests = list(self._in_flight)
        await self._llm.abort(requests)
        return len(requests)

    async def init_weights(self, init_info: Mapping[str, Any]) -> None:
        """Join the sender's group; returns once all its ranks are there. Raises EngineError."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        try:
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=dict(init_info)))
        except Exception as error:
            raise EngineError(f"{self._name}: no connection to the sender of weights: {error}") from error

    async def pause(self) -> None:
        """Stop between two tokens. Completions in flight stay, and go on after `resume` with new weights."""
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        self._paused = True

    async def receive(self, version: int) -> float:
        """Take one full set of weights from the sender; returns the seconds it took.

        Raises EngineError naming what failed; the engine then refuses to sample until a later call succeeds
        (after a new `init_weights`, because a failure closes the group).
        """
        if not self._paused:
            raise EngineError(f"{self._name}: weights of version {version} came without a pause")
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        began = time.monotonic()
        try:
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"version": version}))
            await self._llm.finish_weight_update(str(version))
        except Exception as error:
            self._failed_sync = f"the update to weight version {version} failed: {error}"
            raise EngineError(f"{self._name}: {self._failed_sync}") from error
        self._version = version
        self._failed_sync = None
        return time.monotonic() - began

    async def resume(self) -> None:
        """Go on sampling. Raises EngineError while the weights are those of a failed update."""
        if self._failed_sync is not None:
            raise EngineError(f"{self._name}: stays paused: {self._failed_sync}")
        # An update does not do it: cached prefixes were computed by the old weights.
        if not await self._llm.reset_prefix_cache(reset_running_requests=True):
            raise EngineError(f"{self._name}: stays paused: vLLM did not drop its prefix cache")
        await self._llm.resume_generation()
        self._paused = False

    async def info(self) -> EngineInfo:
        """The engine's state. Answers while weights are received."""
        return EngineInfo(
            name=self._name,
            pid=os.getpid(),
            child_pids=tuple(child.pid for child in multiprocessing.active_children() if child.pid),
            version=self._version,
            failed_sync=self._failed_sync,
            paused=self._paused,
            in_flight=len(self._in_flight),
        )

    async def stop(self) -> None:
        """End vLLM's core process."""
        self._llm.shutdown()

    async def _complete(self, request: str, prompt: Prompt, sampling: SamplingSettings) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop=list(sampling.stop),
            seed=sampling.seed,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens = TokensPrompt(prompt_token_ids=prompt.tokens.tolist())
        outputs: list[Any] = []
        async for answer in self._llm.generate(tokens, params, request):
            outputs = answer.outputs
        return sorted(outputs, key=lambda output: output.index)

    def _rollout(self, output: Any) -> Rollout:
        tokens = list(output.token_ids)
        if output.finish_reason not in ("stop", "length", "abort"):
            raise EngineError(f"{self._name}: vLLM ended a completion with {output.finish_reason!r}")
        spans = [int(span.version) for span in output.weight_versions or ()] or [self._version]
        return Rollout(
            tokens=int_row(tokens),
            logprobs=float_row(
                [entry[token].logprob for token, entry in zip(tokens, output.logprobs or (), strict=True)]
            ),
            text=output.text,
            finish=cast(Finish, output.finish_reason),
            loss_mask=int_row([1] * len(tokens)),
            versions=(min(spans), max(spans)),
        )


def engine_arguments(config: RunConfig, model_path: str, device: str) -> dict[str, Any]:
    """Arguments for vLLM's AsyncEngineArgs."""
    rollout = config.rollout
    return {
        "model": model_path,
        "dtype": config.model.torch_dtype,
        "max_model_len": rollout.max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "enforce_eager": rollout.enforce_eager,
        "enable_prefix_caching": rollout.enable_prefix_caching,
        # The probability of the token under temperature and top-p: that is the policy that sampled it.
        "logprobs_mode": "processed_logprobs",
        "seed": config.seed,
        "weight_transfer_config": {"backend": "gloo"},
        "disable_log_stats": True,
        **_memory_arguments(rollout, device),
    }


def completion_arguments(model_path: str, device: str, dtype: str, length: int) -> dict[str, Any]:
    """Arguments for an engine that completes one prompt, of `length` tokens with the completion."""
    return {
        "model": model_path,
        "dtype": dtype,
        "max_model_len": length,
        "max_num_seqs": 1,
        "enforce_eager": True,
        "disable_log_stats": True,
        **_memory_arguments(RolloutConfig(), device),
    }


async def stream_completion(
    arguments: Mapping[str, Any], tokens: Sequence[int], *, max_tokens: int, temperature: float, seed: int
) -> AsyncGenerator[str]:
    """Text of one completion as it comes, from an engine that lives for it alone. Raises EngineError."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=seed, output_kind=RequestOutputKind.DELTA
    )
    try:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except Exception as error:
        raise EngineError(f"vLLM did not start with {arguments['model']}: {error!r}") from error
    try:
        async for answer in llm.generate(TokensPrompt(prompt_token_ids=list(tokens)), params, "1"):
            yield answer.outputs[0].text
    except Exception as error:
        raise EngineError(f"vLLM failed with {arguments['model']}: {error!r}") from error
    finally:
        llm.shutdown()
        # Its destructor fails once the interpreter is going down, and this frame can live until then.
        del llm


def _memory_arguments(rollout: RolloutConfig, device: str) -> dict[str, Any]:
    if device == "cuda":
        return {"gpu_memory_utilization": rollout.gpu_memory_utilization}
    return {
        "kv_cache_memory_bytes": rollout.kv_cache_memory_bytes,
        # vLLM 0.32 rewinds the generator of a seeded request whose prompt it took in part, and torch's CPU
        # generator cannot: the whole engine ends. Without chunks a prompt waits for a step it fits into.
        "enable_chunked_prefill": False,
    }


def engine_environment(model_path: str, device: str, num_cpus: float) -> dict[str, str]:
    """Environment variables of an engine's processes."""
    environment = {OWNED_ENGINE: "1", "VLLM_NO_USAGE_STATS": "1"}
    if Path(model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if device == "cpu":
        environment |= {
            # vLLM on CPU otherwise adds a third process, for the sake of thread binding.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # By default every engine of a machine is bound to the same first cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, int(num_cpus))),
            # Even with enforce_eager, the first logprobs would compile a helper for 10 to 30 s.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return environment
