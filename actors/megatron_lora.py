"""LoRA on a Megatron model: an adapter for every Hugging Face linear that a Megatron weight is made of.

A module X gets a child `X.lora`, by leaf name of the HF module an Adapter with A and B; what they add to X's
output is exactly PEFT's. The base model's parameters are frozen and never written.

On a machine without CUDA, actors.megatron_cpu.install() must have run before this module is imported.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.post_training.modelopt.layers import Linear as WholeLinear
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe.router import Router

from bridge.lora import Part, Target, keys_of
from bridge.megatron import named_parameters

_CHILD = "lora"
Kind = Literal["column", "row", "whole", "embedding"]


class Adapter(torch.nn.Module):
    """A [rank, in] and B [out, rank] of one HF linear, this rank's part of them."""

    def __init__(self, part: Part, like: torch.Tensor) -> None:
        super().__init__()
        self.part = part
        self.A = torch.nn.Parameter(like.new_zeros(part.shape("A")))
        self.B = torch.nn.Parameter(like.new_zeros(part.shape("B")))


class Adapters(torch.nn.ModuleDict):
    """What is added to one Megatron module: the adapters of its HF linears, by leaf name."""

    _rows: torch.Tensor | None
    _scales: torch.Tensor | None

    def __init__(self, target: Target, module: torch.nn.Module, weight: torch.Tensor, seed: int) -> None:
        super().__init__({part.leaf: Adapter(part, weight) for part in target.parts})
        self.target = target
        self.enabled = True
        self._kind, self.is_expert, self._group, self._sequence_parallel = _place_of(module)
        # Experts get their tokens from, and give them to, a dispatcher that gathers and sums itself.
        self._communicates = not self.is_expert and self._kind != "whole" and self._group.size() > 1
        rows = weight.shape[1 if target.is_embedding else 0]
        self.register_buffer("_rows", _rows_of(target.parts, rows, weight.device), persistent=False)
        scales = [part.scale for part in target.parts for _ in range(part.rank)]
        self._scale = scales[0]
        unequal = torch.tensor(scales, device=weight.device) if len(set(scales)) > 1 else None
        self.register_buffer("_scales", unequal, persistent=False)
        self._rng = _rng_state(self.is_expert, self._input_is_split, seed)
        self._mark(weight)
        _initialise(target, self, seed)

    @property
    def _input_is_split(self) -> bool:
        """Whether tensor-parallel ranks see different elements of the input."""
        return self._kind == "row" or self._sequence_parallel

    def adapters(self) -> Iterator[Adapter]:
        """In the order of the target's parts."""
        for adapter in self.values():
            yield cast(Adapter, adapter)

    def delta(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What to add to the module's output for `inputs`, in the output's shape and of `dtype`."""
        inner = self._looked_up(inputs) if self._kind == "embedding" else self._inner(inputs.to(dtype))
        inner = self._exchanged(inner)
        inner = inner * (self._scale if self._scales is None else self._scales.to(inner.dtype))
        return F.linear(inner.to(dtype), self._fused().to(dtype))

    def _inner(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs` times the As of all parts, one after the other: [..., sum of ranks]."""
        adapters = list(self.adapters())
        dropout = adapters[0].part.dropout
        if not (self.training and dropout):
            return F.linear(inputs, torch.cat([adapter.A for adapter in adapters]).to(inputs.dtype))
        with self._random():
            return torch.cat(
                [F.linear(F.dropout(inputs, dropout), adapter.A.to(inputs.dtype)) for adapter in adapters],
                dim=-1,
            )

    def _random(self) -> AbstractContextManager[None]:
        # Declared without types.
        tracker: Any = get_cuda_rng_tracker()
        return tracker.fork(self._rng)

    def _looked_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """Columns of A for the tokens that this rank has, zeros for others. As PEFT's, without dropout."""
        (adapter,) = self.adapters()
        size = adapter.part.local_in
        local = tokens - self._group.rank() * size
        held = (local >= 0) & (local < size)
        inner = F.embedding(local.clamp(0, size - 1), adapter.A.t())
        inner = inner * held[..., None]
        return inner.transpose(0, 1).contiguous() if self._sequence_parallel else inner

    def _exchanged(self, inner: torch.Tensor) -> torch.Tensor:
        # What Megatron does to the module's input or output is done to the few numbers in between.
        if not self._communicates:
            return inner
        match self._kind, self._sequence_parallel:
            case "column", True:
                return gather_from_sequence_parallel_region(inner, group=self._group)
            case "column", False:
                return copy_to_tensor_model_parallel_region(inner, group=self._group)
            case _, True:
                return reduce_scatter_to_sequence_parallel_region(inner, group=self._group)
            case _:
                return reduce_from_tensor_model_parallel_region(inner, group=self._group)

    def _fused(self) -> torch.Tensor:
        """The Bs as one matrix [out, sum of ranks]: every row of the module's output has its part's, or zeros."""
        factors = [adapter.B for adapter in self.adapters()]
        width = sum(factor.shape[1] for factor in factors)
        padded: list[torch.Tensor] = []
        before = 0
        for factor in factors:
            rank = factor.shape[1]
            padded.append(F.pad(factor, (before, width - before - rank)) if rank < width else factor)
            before += rank
        if self._rows is None:
            return torch.cat(padded) if len(padded) > 1 else padded[0]
        padded.append(factors[0].new_zeros(1, width))
        return torch.cat(padded).index_select(0, self._rows)

    def _mark(self, weight: torch.Tensor) -> None:
        """Tell Megatron which factors are split, whose gradients to add up, and what the norm counts."""
        split = "B" if self._kind == "column" else "A" if self._kind in ("row", "embedding") else ""
        split_dim = 0 if self._kind == "column" else 1
        # The rule of _mark_experts in megatron_setup, which has marked the weight.
        allreduce = bool(getattr(weight, "allreduce", True))
        for adapter in self.adapters():
            for name, parameter in (("A", adapter.A), ("B", adapter.B)):
                # A rank may have no row of a part; there is then nothing to train.
                parameter.requires_grad_(parameter.numel() > 0)
                marks: Any = parameter
                marks.allreduce = allreduce
                if name == split:
                    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=split_dim, stride=1)
                elif not self.is_expert:
                    marks.sequence_parallel = self._sequence_parallel
                elif not allreduce:
                    # Ranks of the ordinary tensor-parallel group may have other experts, and ranks of an
                    # expert's own group are not told apart: its first one is counted.
                    marks.tensor_model_parallel = True
                    marks.shared = self._group.rank() > 0

    def partial_gradients(self) -> list[torch.nn.Parameter]:
        """Factors whose gradient is a sum over an expert's tensor-parallel ranks that Megatron does not take."""
        if not self.is_expert or self._group.size() == 1:
            return []
        return [adapter.A if self._kind == "column" else adapter.B for adapter in self.adapters()]

    @property
    def group(self) -> Any:
        """The ranks that share the module."""
        return self._group

    def is_split(self, factor: Literal["A", "B"]) -> bool:
        """Whether ranks of the group hold different parts of A or B."""
        return factor == "B" if self._kind == "column" else factor == "A" and self._kind != "whole"


def attach(
    chunks: Sequence[torch.nn.Module],
    targets: Sequence[Target],
    *,
    seed: int,
    trainable: Collection[str] = (),
) -> None:
    """Add adapters to this rank's bare model chunks, and freeze everything else.

    `targets` are bridge.lora.targets_of this rank's parameters. Base parameters named in `trainable` (global
    names) stay trainable. A and B start as PEFT's do: nothing is added to the output of a linear, and the
    numbers depend on `seed` and the HF module alone, not on the layout.
    """
    parameters = named_parameters(chunks)
    for name, parameter in parameters.items():
        if parameter.is_leaf and parameter.is_floating_point() and name not in trainable:
            parameter.requires_grad_(False)
    owners = {
        id(weight): module
        for chunk in chunks
        for module in chunk.modules()
        for name, weight in module.named_parameters(recurse=False)
        if name == "weight"
    }
    for target in targets:
        weight = parameters[target.weight]
        _attach(owners[id(weight)], Adapters(target, owners[id(weight)], weight, seed))


def _attach(module: torch.nn.Module, adapters: Adapters) -> None:
    module.add_module(_CHILD, adapters)
    if isinstance(module, Router):
        base: Callable[[torch.Tensor], torch.Tensor] = module.gating

        def gating(inputs: torch.Tensor) -> torch.Tensor:
            logits = base(inputs)
            return logits + adapters.delta(inputs, logits.dtype) if adapters.enabled else logits

        # An attribute of this object, in front of its class's method.
        module.gating = gating  # pyright: ignore[reportAttributeAccessIssue]
        return

    def add(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...], output: Any) -> Any:
        if not adapters.enabled:
            return output
        # Megatron's linears return their bias too, its embedding does not.
        if isinstance(output, torch.Tensor):
            return output + adapters.delta(arguments[0], output.dtype)
        value, bias = output
        return value + adapters.delta(arguments[0], value.dtype), bias

    module.register_forward_hook(add)


def adapters_of(chunks: Sequence[torch.nn.Module]) -> list[Adapters]:
    """All adapters of the chunks."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapters)]


@contextmanager
def adapters_off(chunks: Sequence[torch.nn.Module]) -> Generator[None]:
    """While it lasts the chunks compute what the base model does."""
    found = adapters_of(chunks)
    before = [adapters.enabled for adapters in found]
    try:
        for adapters in found:
            adapters.enabled = False
        yield
    finally:
        for adapters, enabled in zip(found, before, strict=True):
            adapters.enabled = enabled


@contextmanager
def detached(chunks: Sequence[torch.nn.Module]) -> Generator[None]:
    """While it lasts the adapters are not among the chunks' modules, as if there were only the base model."""
    owners = [
        (module, child)
        for chunk in chunks
        for module in chunk.modules()
        for child in module.children()
        if isinstance(child, Adapters)
    ]
    try:
        for module, _ in owners:
            delattr(module, _CHILD)
        yield
    finally:
        for module, child in owners:
            module.add_module(_CHILD, child)


@torch.no_grad()
def merge(chunks: Sequence[torch.nn.Module], merged: Mapping[str, torch.Tensor]) -> None:
    """Write `merged` (bridge.merged) into the model for good, and take the adapters off."""
    parameters = named_parameters(chunks)
    for adapters in adapters_of(chunks):
        parameters[adapters.target.weight].copy_(merged[adapters.target.weight])
        adapters.enabled = False
    for module in [module for chunk in chunks for module in chunk.modules()]:
        if any(isinstance(child, Adapters) for child in module.children()):
            delattr(module, _CHILD)


def sum_expert_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Add up what the tensor-parallel ranks of experts have of gradients of factors that are whole on each.

    Before the gradients are summed over data-parallel ranks.
    """
    parameters = [parameter for adapters in adapters_of(chunks) for parameter in adapters.partial_gradients()]
    marks: list[Any] = [parameter for parameter in parameters if parameter.requires_grad]
    if not marks:
        return
    joined = torch.cat([parameter.main_grad.flatten() for parameter in marks])
    group: Any = parallel_state.get_expert_tensor_parallel_group()
    dist.all_reduce(joined, group=group)
    sums = joined.split([parameter.numel() for parameter in marks])
    for parameter, total in zip(marks, sums, strict=True):
        parameter.main_grad.copy_(total.view_as(parameter.main_grad))


def _place_of(module: torch.nn.Module) -> tuple[Kind, bool, Any, bool]:
    """How the module is split, whether it is an expert's, over which group, and whether its tokens are."""
    match module:
        case ColumnParallelLinear() | RowParallelLinear():
            kind: Kind = "column" if isinstance(module, ColumnParallelLinear) else "row"
            sequence_parallel = bool(module.sequence_parallel) and not module.is_expert
            return kind, module.is_expert, module.tp_group, sequence_parallel
        case VocabParallelEmbedding():
            return "embedding", False, module.tp_group, module.reduce_scatter_embeddings
        case torch.nn.Linear() if not isinstance(module, WholeLinear):
            # Of a vision tower, which every rank runs on all pictures.
            return "whole", False, parallel_state.get_tensor_model_parallel_group(), False
        case _:
            # Whole on every rank: a router, or a down-projection of latent attention.
            config: Any = module.config
            group = parallel_state.get_tensor_model_parallel_group()
            return "whole", False, group, config.sequence_parallel


def _rows_of(parts: Sequence[Part], rows: int, device: torch.device) -> torch.Tensor | None:
    """For every row of the weight its place among the rows of all Bs, where there is none one behind the last.

    None when that is the order they are in.
    """
    count = sum(part.shape("B")[0] for part in parts)
    places = torch.full((rows,), count)
    position = 0
    for run in [run for part in parts for run in part.rows]:
        places[run.local : run.local + run.count] = torch.arange(position, position + run.count)
        position += run.count
    return None if torch.equal(places, torch.arange(count)) else places.to(device)


def _rng_state(is_expert: bool, is_split: bool, seed: int) -> str:
    """Name of the random numbers for dropout, which ranks share that see the same input.

    Megatron's own are the same on all data- and context-parallel ranks.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    if is_expert:
        # Declared as if there might be no groups.
        places: list[Any] = [
            parallel_state.get_expert_data_parallel_rank(),
            parallel_state.get_expert_model_parallel_rank(),
        ]
        tensor: Any = parallel_state.get_expert_tensor_parallel_rank()
    else:
        places = [parallel_state.get_data_parallel_rank(with_context_parallel=True)]
        tensor = parallel_state.get_tensor_model_parallel_rank()
    name = f"lora-{'expert' if is_expert else 'dense'}-{'split' if is_split else 'whole'}"
    tracker: Any = get_cuda_rng_tracker()
    if name not in tracker.get_states():
        tracker.add(name, _number(f"{seed}/{name}/{pipeline}/{places}/{tensor if is_split else ''}"))
    return name


def _number(text: str) -> int:
    """The same number of 62 bits in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2


@torch.no_grad()
def _initialise(target: Target, adapters: Adapters, seed: int) -> None:
    for part, adapter in zip(target.parts, adapters.adapters(), strict=True):
        key_A, key_B = keys_of(target, part)
        generator = torch.Generator()
        if target.is_embedding:
            generator.manual_seed(_number(f"{seed}/{key_B}"))
            adapter.B.copy_(torch.randn(part.out_features, part.rank, generator=generator))
            continue
        generator.manual_seed(_number(f"{seed}/{key_A}"))
        bound = 1 / math.sqrt(part.in_features)
        whole = torch.empty(part.rank, part.in_features).uniform_(-bound, bound, generator=generator)
        start, stop = part.columns
        adapter.A[:, : stop - start].copy_(whole[:, start:stop])
