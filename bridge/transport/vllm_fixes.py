"""Repairs of vLLM's layerwise weight reload, of its rotary embedding on CPU, and of its calls of several workers.

Those of the reload are called by name, on one model, from our transfer engine; the others are installed once in
each engine process, before it builds a model. Written for vLLM 0.32; the names they use are private to it, so
any other version is refused.
"""

import functools
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
import vllm
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.model_executor.model_loader.reload.utils import get_layer_tensors, get_tensor_load_numel
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

from configs.errors import BasculeError


def require_written_for() -> None:
    """Raises BasculeError when the installed vLLM is not the one that these repairs were written for."""
    if not vllm.__version__.startswith("0.32."):
        raise BasculeError(
            f"vllm {vllm.__version__}: what is wrong in it is repaired for 0.32 only; install vllm 0.32 "
            "or revise bridge/transport/vllm_fixes.py"
        )


def waiting_layers(model: torch.nn.Module) -> dict[str, int]:
    """Layers of an open update that are not complete, and how many elements they have got so far."""
    return {
        name: info.load_numel
        for name, layer in model.named_modules()
        if (info := layerwise.get_layerwise_info(layer)).can_load()
    }


def unloaded_layers(model: torch.nn.Module, expected: set[str] | None = None) -> list[str]:
    """Layers of an open update that miss weights, as `name (loaded of total elements)`.

    With `expected`, other layers may have got nothing at all: they keep what they have.

    Symptom: finishing an update with q_proj but no k_proj leaves uninitialised memory in the layer, and a
    layer without any weights keeps its old ones; vLLM reports neither.
    To be dropped when finalize_layerwise_reload raises in both cases.
    """
    pending = [
        (name, layer, info)
        for name, layer in model.named_modules()
        if (info := layerwise.get_layerwise_info(layer)).can_load() and not is_deferred_attention_layer(layer)
    ]
    fresh = _storages(p for layer in model.modules() for p in layer.parameters(recurse=False))
    missing: list[tuple[str, LayerReloadingInfo]] = []
    for name, layer, info in pending:
        if _will_complete(layer, info):
            fresh |= _storages(_kernel_parameters(info))
        else:
            missing.append((name, info))
    # A tied lm_head gets no weights of its own: it shares the storage of the embedding, which got them.
    return [
        f"{name} ({info.load_numel} of {info.load_numel_total})"
        for name, info in missing
        if info.load_numel
        or ((expected is None or name in expected) and not _storages(_kernel_parameters(info)) <= fresh)
    ]


def abort_layerwise_reload(model: torch.nn.Module) -> None:
    """Close an open update: layers that are still waiting get their previous tensors back.

    Symptom: after an exception in the middle of an update, parameters stay on the meta device and later
    updates fail or load into the wrong tensors. Layers that were complete keep the new weights, so the
    model is a mixture until the next full update.
    To be dropped when vLLM has an abort for initialize_layerwise_reload.
    """
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            for tensor in get_layer_tensors(layer).values():
                if hasattr(tensor, "weight_loader"):
                    vars(tensor)["weight_loader"] = layerwise._get_original_loader(tensor)
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
        info.reset()
    layerwise.LOADING_LAYERS.clear()


class LoadCounts:
    """How many elements a call of a weight loader copies, counted once for every kind of call.

    Symptom: for every tensor of every update vLLM runs the loader twice, the first time on no memory, to count,
    which takes most of the time that small tensors take. What is counted depends on the loader, which belongs to a
    layer, on shapes and types, and on the other arguments (the shard, the expert).
    To be dropped when counting costs microseconds, or vLLM remembers.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, object]] = {}

    @contextmanager
    def in_use(self) -> Generator[None]:
        """While the body loads weights."""
        counting = _LAYERWISE.get_numel_loaded
        _LAYERWISE.get_numel_loaded = functools.partial(self._count, counting)
        try:
            yield
        finally:
            _LAYERWISE.get_numel_loaded = counting

    def _count(
        self, counting: Callable[..., tuple[int, object]], loader: Callable[..., object], arguments: Any
    ) -> tuple[int, object]:
        try:
            key = loader, *((name, _kind(value)) for name, value in arguments.arguments.items())
            known = self._known.get(key)
        except TypeError:
            # Something that cannot be compared by value.
            return counting(loader, arguments)
        if known is None:
            known = counting(loader, arguments)
            if known[1] is None or isinstance(known[1], bool):
                self._known[key] = known
        return known


# Any: it imports the function for itself.
_LAYERWISE: Any = layerwise


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


def repack_tied_lm_head(model: torch.nn.Module) -> None:
    """Pack embedding and output matrices again for the CPU's matrix product, after a finished update.

    Symptom: a tied lm_head has new values in `weight`, but `cpu_linear` still holds the packed old ones:
    logits are silently stale.
    To be dropped when an update processes layers that share a parameter with another (it does not in 0.33).
    """
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding) and isinstance(
            layer.quant_method, UnquantizedEmbeddingMethod
        ):
            layer.quant_method.process_weights_after_loading(layer)


def prepack_experts_on_update(model: torch.nn.Module) -> None:
    """Let the model's expert layers be packed in every update, not only at start. CPU only; may be repeated.

    Symptom: expert weights are packed for the CPU's grouped product at the first load but copied unpacked
    by an update, so that pushing the very same weights changes the output.
    To be dropped when UnquantizedFusedMoEMethod._setup_kernel packs in updates as well (not in 0.33).
    """
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod) and "_setup_kernel" not in vars(method):
            vars(method)["_setup_kernel"] = functools.partial(_setup_and_pack, method, method._setup_kernel)


def rotate_heads_flat() -> None:
    """Give the CPU's rotary kernel queries and keys as [tokens, heads * head size]. May be repeated.

    Symptom: given [tokens, heads, head size], as latent attention (DeepSeek-V2 and -V3) does, the kernel takes the
    number of heads and the distance between tokens from the wrong dimensions; samples and log-probabilities are
    silently wrong. The scaled embedding of DeepSeek's YaRN does not use the kernel and is right.
    To be dropped when RotaryEmbedding.forward_cpu equals forward_native for a query of three dimensions.
    """
    RotaryEmbedding.forward_cpu = _forward_flat


def hear_all_workers() -> None:
    """Let a call of all workers take every worker's answer, and name all that failed. May be repeated.

    Symptom: when the first worker of several fails in a call (a weight update, say), the others' answers stay in
    their queues, and each later call takes those of the call before: good calls raise old errors, and calls return
    while workers are still busy with them.
    To be dropped when MultiprocExecutor.collective_rpc reads all queues before it raises.
    """
    # Any: ours has fewer names for what it hands on.
    executor: Any = MultiprocExecutor
    executor.collective_rpc = _collective_rpc


def keep_experts_with_adapters_elsewhere() -> None:
    """Let experts be computed as without LoRA when an engine has it for other modules. CPU only.

    Symptom: with enable_lora vLLM takes Triton's kernel for all experts, also when lora_target_modules leaves
    them out; on CPU there is no Triton, and the first prompt fails.
    To be dropped when select_unquantized_moe_backend looks at the modules, or at the platform.
    """
    _EXPERTS.select_unquantized_moe_backend = _backend_without_lora


# Any: it imports the function for itself.
_EXPERTS: Any = unquantized_fused_moe_method
_select_backend = _EXPERTS.select_unquantized_moe_backend


def _backend_without_lora(moe_config: Any) -> Any:
    moe_config.is_lora_enabled = False
    return _select_backend(moe_config)


class _Answers:
    """A worker's queue of answers in which a failure looks like a success with a failure inside."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def dequeue(self, timeout: float | None = None) -> tuple[Any, Any]:
        """The next answer."""
        return WorkerProc.ResponseStatus.SUCCESS, self._queue.dequeue(timeout=timeout)

    def shutdown(self) -> None:
        """Let the one who waits for an answer fail."""
        self._queue.shutdown()


_call_workers = MultiprocExecutor.collective_rpc


def _collective_rpc(
    self: MultiprocExecutor,
    method: Any,
    timeout: float | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    **others: Any,
) -> Any:
    # One that asks a single worker, or does not wait, is right as it is.
    if others:
        return _call_workers(self, method, timeout, args, kwargs, **others)
    queues = self.response_mqs
    self.response_mqs = hearing = [_Answers(queue) for queue in queues]
    try:
        answers = _call_workers(self, method, timeout, args, kwargs)
    finally:
        # A shutdown meanwhile has taken them away.
        if self.response_mqs is hearing:
            self.response_mqs = queues
    failures = [str(result) for status, result in answers if status != WorkerProc.ResponseStatus.SUCCESS]
    if failures:
        raise RuntimeError("; ".join(dict.fromkeys(failures)))
    return [result for _, result in answers]


def _forward_flat(
    self: RotaryEmbedding, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In place where the heads of a token lie side by side, as before; callers take what is returned."""
    tokens = positions.numel()
    flat_query = query.reshape(tokens, -1)
    flat_key = None if key is None else key.reshape(tokens, -1)
    cache = self._match_cos_sin_cache_dtype(query)
    ops.rotary_embedding(positions, flat_query, flat_key, self.head_size, cache, self.is_neox_style)
    if key is None or flat_key is None:
        return flat_query.view(query.shape), None
    return flat_query.view(query.shape), flat_key.view(key.shape)


def _setup_and_pack(method: Any, setup_kernel: Callable[..., None], layer: Any, **weights: Any) -> None:
    is_update = method.moe_kernel is not None
    setup_kernel(layer=layer, **weights)
    if is_update:
        method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def _will_complete(layer: torch.nn.Module, info: LayerReloadingInfo) -> bool:
    """Whether finishing the update will process a waiting layer rightly: nothing to load, or only padding."""
    parameters = {
        name: parameter
        for name, parameter in layer.named_parameters(recurse=False)
        if name not in SKIP_LOAD_TENSORS
    }
    if isinstance(layer, VocabParallelEmbedding):
        # Rows that pad the vocabulary are zeroed by the loader and not counted.
        return set(parameters) <= {name for name, _ in info.loaded_weights}
    return info.load_numel >= sum(get_tensor_load_numel(parameter) for parameter in parameters.values())


def _kernel_parameters(info: LayerReloadingInfo) -> Iterable[torch.Tensor]:
    return () if info.kernel_tensors is None else info.kernel_tensors[0].values()


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta}
