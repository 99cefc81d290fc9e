"""Makes the unmodified megatron-core wheel import and run on a machine without CUDA.

Megatron-core names the device "cuda" in hundreds of places and takes streams, events and generators from
`torch.cuda`. `install` puts an import hook in front of `megatron.core` that changes, in each module's
compiled code, the string "cuda" to "cpu" and the name `torch.cuda` to a private namespace of CPU stand-ins.
`torch.cuda` itself stays as it is, nothing is written to disk, and no operation gets slower. Modules that
need more than that have a function each in `_FIXES`, with its reason and what would let it go.

All of this goes when megatron-core takes its device from torch.accelerator.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import CodeType, ModuleType
from typing import Any

import torch

from actors.megatron_adam import FusedAdamW
from configs.errors import BasculeError

SUPPORTED_VERSION = "0.16.1"
_PACKAGE = "megatron.core"
_NAMESPACE = "_bascule_cuda"
_STRINGS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_NAMES = {
    "cuda": _NAMESPACE,
    "torch.cuda": _NAMESPACE,
    "torch.cuda.nvtx": f"{_NAMESPACE}.nvtx",
    "torch.cuda.memory": f"{_NAMESPACE}.memory",
}

_EXPECTED = (
    "(Transformer Engine and )?Apex (is|are) not installed",
    # Megatron warns about its own default, and then takes what it advises.
    "full scope is deprecated",
    # Of experts, whose own tensor-parallel size may be 1.
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",
)
"""Beginnings of Megatron's warnings that say nothing new on a machine without CUDA."""


def install() -> None:
    """Let this process import and run megatron.core on CPU. A second call does nothing.

    Call it before anything imports megatron.core, and not at all where CUDA is used. Raises BasculeError when
    megatron.core is already imported or is not the release this was written for.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    version = importlib.metadata.version("megatron-core")
    if version != SUPPORTED_VERSION:
        raise BasculeError(
            f"megatron-core {version} is installed, but actors/megatron_cpu.py patches {SUPPORTED_VERSION}: "
            f"install megatron-core=={SUPPORTED_VERSION} to run on CPU"
        )
    imported = sorted(name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}."))
    if imported:
        raise BasculeError(
            f"{imported[0]} is already imported in this process and needs CUDA: "
            "call actors.megatron_cpu.install() before the first import of megatron.core"
        )
    namespace = _build_namespace()
    setattr(torch, _NAMESPACE, namespace)
    setattr(torch.backends, _NAMESPACE, torch.backends.cuda)
    setattr(torch.Tensor, _NAMESPACE, lambda tensor, *args, **kwargs: tensor)
    sys.meta_path.insert(0, _Finder())
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message, UserWarning)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(f"{_PACKAGE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        code = super().get_code(fullname)
        return None if code is None else _rewrite_code(code)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        fix = _FIXES.get(module.__name__)
        if fix is not None:
            fix(module)


def _rewrite_code(code: CodeType) -> CodeType:
    return code.replace(
        co_consts=tuple(_rewrite_constant(value) for value in code.co_consts),
        co_names=tuple(_NAMES.get(name, name) for name in code.co_names),
    )


def _rewrite_constant(value: Any) -> Any:
    match value:
        case CodeType():
            return _rewrite_code(value)
        case str():
            return _STRINGS.get(value, value)
        case tuple():
            return tuple(_rewrite_constant(item) for item in value)
        case frozenset():
            return frozenset(_rewrite_constant(item) for item in value)
        case _:
            return value


class _Stream:
    """CPU work is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.recorded_s = 0.0

    def record(self, stream: Any = None) -> None:
        self.recorded_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return (end.recorded_s - self.recorded_s) * 1e3


class _Generators:
    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def _no_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _device_names() -> dict[str, Any]:
    stream = _Stream()
    return {
        "current_device": _always(torch.device("cpu")),
        "set_device": _ignore,
        "device": _no_context,
        "device_count": _always(1),
        "is_available": _always(False),
        "get_device_capability": _always((0, 0)),
        "synchronize": _ignore,
        "Stream": _Stream,
        "ExternalStream": _Stream,
        "Event": _Event,
        "stream": _no_context,
        "set_stream": _ignore,
        "current_stream": _always(stream),
        "default_stream": _always(stream),
        "is_current_stream_capturing": _always(False),
        "FloatTensor": torch.FloatTensor,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        "_lazy_init": _ignore,
        "_lazy_call": lambda call, **kwargs: call(),
    }


def _memory_names() -> dict[str, Any]:
    counters = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    return {
        **dict.fromkeys(counters, _always(0)),
        "memory_stats": lambda *args: {},
        "mem_get_info": _always((0, 0)),
        "empty_cache": _ignore,
    }


def _random_names() -> dict[str, Any]:
    return {
        "manual_seed": torch.manual_seed,
        "initial_seed": torch.initial_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "default_generators": _Generators(),
    }


def _build_namespace() -> ModuleType:
    submodules: dict[str, Mapping[str, Any]] = {
        "nvtx": {"range_push": _ignore, "range_pop": _ignore, "range": _no_context},
        "random": _random_names(),
        "memory": {
            "MemPool": torch.cuda.MemPool,
            "CUDAPluggableAllocator": torch.cuda.memory.CUDAPluggableAllocator,
        },
        "amp": {"custom_fwd": torch.cuda.amp.custom_fwd, "custom_bwd": torch.cuda.amp.custom_bwd},
    }
    namespace = ModuleType(_NAMESPACE)
    vars(namespace).update(_device_names() | _memory_names() | _random_names())
    for name, names in submodules.items():
        module = ModuleType(f"{_NAMESPACE}.{name}")
        vars(module).update(names)
        setattr(namespace, name, module)
        sys.modules[module.__name__] = module
    # `import torch.cuda` binds the name `torch` to this module, whose attribute `cuda` is read next.
    setattr(namespace, _NAMESPACE, namespace)
    # Classes that are only named (isinstance, annotations) are the real ones.
    vars(namespace).update(__path__=[], __getattr__=lambda name: getattr(torch.cuda, name))
    sys.modules[_NAMESPACE] = namespace
    return namespace


def _fix_jit(module: ModuleType) -> None:
    # torch.compile of a dozen one-line functions costs seconds at start and gains nothing on CPU.
    module.disable_jit_fuser()


def _fix_random(module: ModuleType) -> None:
    # The "CUDA" generator is the CPU one here, so fork() sees it change; the warning is about that.
    logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state" not in record.getMessage())
    # 0.16.1 stores `fp8 is not None`, so the default False takes the Transformer Engine path of selective
    # recompute. Goes when CheckpointWithoutOutput stores the flag itself.
    init = module.CheckpointWithoutOutput.__init__

    @wraps(init)
    def init_with_bool(self: Any, fp8: bool = False) -> None:
        init(self, fp8)
        self.fp8 = bool(fp8)

    module.CheckpointWithoutOutput.__init__ = init_with_bool


def _fix_rope_utils(module: ModuleType) -> None:
    # The original asks for pinned memory, which needs an accelerator. Goes when it only does so on CUDA.
    def get_pos_emb_on_this_cp_rank(pos_emb: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
        size, rank = cp_group.size(), cp_group.rank()
        before, after = pos_emb.shape[:seq_dim], pos_emb.shape[seq_dim + 1 :]
        halves = pos_emb.view(*before, 2 * size, -1, *after)
        mine = halves.index_select(seq_dim, torch.tensor([rank, 2 * size - rank - 1]))
        return mine.view(*before, -1, *after)

    vars(module).update(get_pos_emb_on_this_cp_rank=get_pos_emb_on_this_cp_rank)


def _fix_mappings(module: ModuleType) -> None:
    # In a group of one the originals return a view made inside an autograd function; a later in-place
    # operation on it (bias add, cross entropy) raises. Goes when they return their input instead.
    regions = [
        f"{operation}_tensor_model_parallel_region"
        for operation in ("copy_to", "reduce_from", "scatter_to", "gather_from")
    ]
    for name in (*regions, "reduce_scatter_to_sequence_parallel_region"):
        setattr(module, name, _identity_alone(module, getattr(module, name)))
    # Experts split over tensor-parallel ranks get another number of tokens on every rank, and gloo's
    # all_gather and reduce_scatter take only equal ones. Goes when gloo takes others.
    vars(module).update(
        _gather_along_first_dim=_gather_uneven(module._gather_along_first_dim),
        _reduce_scatter_along_first_dim=_reduce_scatter_uneven(module._reduce_scatter_along_first_dim),
    )


def _gather_uneven(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(gather)
    def gathered(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    return gathered


def _reduce_scatter_uneven(scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(scatter)
    def scattered(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, None, use_global_buffer)
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return torch.split(total, input_split_sizes)[group.rank()].contiguous()

    return scattered


def _fix_mla(module: ModuleType) -> None:
    # Without Transformer Engine 0.16.1 still says that it is there, and compares with a class that is not
    # one. Goes when the flag is right.
    vars(module).update(HAVE_TE=False)


def _identity_alone(module: ModuleType, mapping: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(mapping)
    def mapped(input_: torch.Tensor, group: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        resolved = module.get_tensor_model_parallel_group_if_none(group)
        if resolved is not None and resolved.size() == 1:
            return input_
        return mapping(input_, group, *args, **kwargs)

    return mapped


def _fix_moe_utils(module: ModuleType) -> None:
    # 0.16.1 reads the name although it is only bound with Transformer Engine. Goes when it is bound to None.
    vars(module).setdefault("te_general_gemm", None)

    # The original converts only tensors that are on CUDA; gloo needs the split sizes as plain numbers too.
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    vars(module).update(maybe_move_tensor_to_cpu=maybe_move_tensor_to_cpu)


def _fix_optimizer(module: ModuleType) -> None:
    # torch's AdamW keeps `step` per parameter, and checkpoints of the distributed optimizer written that way
    # do not load again in 0.16.1. Goes when they do.
    vars(module).update(Adam=FusedAdamW, USING_PYTORCH_OPTIMIZER=False)


def _fix_distributed_optimizer(module: ModuleType) -> None:
    vars(module).update(Adam=FusedAdamW, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)
    # It copies into fp32 parameters that require a gradient. Goes when upstream adds its missing no_grad.
    optimizer = module.DistributedOptimizer
    load = optimizer.load_parameter_state_from_dp_reshardable
    optimizer.load_parameter_state_from_dp_reshardable = torch.no_grad()(load)


_FIXES: Mapping[str, Callable[[ModuleType], None]] = {
    "megatron.core.jit": _fix_jit,
    "megatron.core.tensor_parallel.random": _fix_random,
    "megatron.core.tensor_parallel.mappings": _fix_mappings,
    "megatron.core.models.common.embeddings.rope_utils": _fix_rope_utils,
    "megatron.core.transformer.moe.moe_utils": _fix_moe_utils,
    "megatron.core.transformer.multi_latent_attention": _fix_mla,
    "megatron.core.optimizer": _fix_optimizer,
    "megatron.core.optimizer.distrib_optimizer": _fix_distributed_optimizer,
}
