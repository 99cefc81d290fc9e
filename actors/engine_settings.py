"""What vLLM is told: arguments and environment of an engine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.env import threads_of
from bridge.transport.registry import OWNED_ENGINE
from configs.engines import EngineConfig
from configs.errors import ConfigError
from configs.schema import RunConfig

KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}
"""Lets glibc use freed memory again. A weight update takes buckets, layers and packed matrices in turn, and pages
that come from the system anew cost three times what a copy into them does. Read when a process starts."""

# What vLLM 0.32 makes room for.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def engine_arguments(
    config: RunConfig,
    model_path: str,
    device: str,
    max_lora_rank: int | None = None,
    lora_modules: Sequence[str] | None = None,
    *,
    with_weights: bool = True,
) -> dict[str, Any]:
    """Arguments for vLLM's AsyncEngineArgs; with a `max_lora_rank` for one adapter of at most that rank.

    `lora_modules` are the last names of the modules that it may adapt, by default all that vLLM can. Without
    weights the engine starts with random ones. Raises ConfigError when the rank is larger than vLLM allows.
    """
    return {
        **_arguments(config, config.rollout, model_path, device),
        "load_format": "auto" if with_weights else "dummy",
        "weight_transfer_config": {"backend": config.bridge.transport},
        **({} if max_lora_rank is None else _lora_arguments(max_lora_rank, lora_modules)),
    }


def teacher_arguments(config: RunConfig, model_path: str, device: str, topk: int) -> dict[str, Any]:
    """The same of a teacher's engine, which never gets weights, and tells up to `topk` tokens at a position."""
    return {**_arguments(config, config.teacher.engine, model_path, device), "max_logprobs": max(topk, 1)}


def _arguments(config: RunConfig, engine: EngineConfig, model_path: str, device: str) -> dict[str, Any]:
    return {
        "model": model_path,
        "dtype": config.model.torch_dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": engine.enforce_eager,
        "enable_prefix_caching": engine.enable_prefix_caching,
        "tensor_parallel_size": engine.tensor_parallel_size,
        # Inside a placement group vLLM would otherwise choose Ray actors of its own for the workers.
        "distributed_executor_backend": "mp" if engine.tensor_parallel_size > 1 else "uni",
        "worker_extension_cls": "bridge.transport.worker_extension.WorkerExtension",
        # The probability of the token under temperature and top-p: that is the policy that sampled it.
        "logprobs_mode": "processed_logprobs",
        "seed": config.seed,
        "disable_log_stats": True,
        **_memory_arguments(engine, device),
        **_vision_arguments(model_path, device),
    }


def _vision_arguments(model_path: str, device: str) -> dict[str, Any]:
    """Of a model that sees: pictures come ready, and which ones are at hand is known to the caller alone."""
    path = Path(model_path) / "config.json"
    if not path.is_file() or "vision_config" not in json.loads(path.read_text()):
        return {}
    # What a CPU has for pictures is not measured: the room for prefixes is given in bytes.
    return {"mm_processor_cache_gb": 0, "skip_mm_profiling": device == "cpu"}


def _lora_arguments(rank: int, modules: Sequence[str] | None) -> dict[str, Any]:
    allowed = next((allowed for allowed in _LORA_RANKS if allowed >= rank), None)
    if allowed is None:
        raise ConfigError(f"lora_rank: vLLM takes ranks up to {_LORA_RANKS[-1]}, the adapter has {rank}")
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": allowed,
        "lora_target_modules": None if modules is None else list(modules),
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
        **_memory_arguments(EngineConfig(), device),
        **_vision_arguments(model_path, device),
    }


def _memory_arguments(engine: EngineConfig, device: str) -> dict[str, Any]:
    if device == "cuda":
        return {"gpu_memory_utilization": engine.gpu_memory_utilization}
    return {
        "kv_cache_memory_bytes": engine.kv_cache_memory_bytes,
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
            "OMP_NUM_THREADS": threads_of(num_cpus),
            **KEEP_MEMORY,
            # Even with enforce_eager, the first logprobs would compile a helper for 10 to 30 s.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return environment
