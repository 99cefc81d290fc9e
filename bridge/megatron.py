"""A live Megatron model's parameters as shards of Hugging Face tensors."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bridge.layouts import Column, Layout, Replicated, Shape, Shard, Vocabulary
from bridge.plan import Piece, TensorInfo
from bridge.rules import Family, Match, MegatronSpec, RuleError

_LAYER_MODULE = re.compile(r"(module\.)*decoder\.layers\.\d+")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_MTP = re.compile(r"mtp\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(r"local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"(linear_fc[12])\.(weight|bias)(\d+)$")
# Transformer Engine fuses norms into the linear that follows, and later releases rename an MTP module.
_SAME = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
    (".mtp_model_layer.", ".transformer_layer."),
)
OUTPUT_LAYER = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"
ADAPTER = ".lora."
"""In the names of adapters' parameters, and in no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where this rank stands: its world rank, and its positions in the two groups that split matrices."""

    rank: int
    tensor_rank: int
    tensor_size: int
    expert_tensor_rank: int
    expert_tensor_size: int


class MisfitError(RuleError):
    """Parameters that the checkpoint in `directory` does not hold.

    `read` are the HF tensors that belong to any parameter. Without a directory it is what one rank has found,
    for the others to add to.
    """

    def __init__(
        self, problems: tuple[str, ...], read: frozenset[str], directory: Path | None = None
    ) -> None:
        super().__init__(problems, read, directory)
        self.problems = problems
        self.read = read
        self.directory = directory

    def __str__(self) -> str:
        what = "the checkpoint" if self.directory is None else f"{self.directory}: the checkpoint"
        return f"{what} does not fit the model of config.json:\n  " + "\n  ".join(self.problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """What a rank holds: its pieces in the order of its parameters, and the HF tensors they belong to.

    `full_precision` are those of the HF tensors that Megatron keeps in float32 whatever the model's type.
    """

    pieces: tuple[Piece, ...]
    shapes: Mapping[str, Shape]
    full_precision: frozenset[str]


def place_of_this_rank() -> Place:
    """From Megatron's process groups, which must have been made."""
    from megatron.core import parallel_state

    # Declared as if there might be no groups.
    expert_rank: Any = parallel_state.get_expert_tensor_parallel_rank()
    expert_size: Any = parallel_state.get_expert_tensor_parallel_world_size()
    return Place(
        rank=torch.distributed.get_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_tensor_rank=expert_rank,
        expert_tensor_size=expert_size,
    )


def named_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Parameters of this rank's model chunks, and routers' expert biases, by global name; no adapters.

    One name for a parameter whether Megatron groups or fuses it or not; global numbers of layers and experts
    come from the modules themselves, so they hold under any split.
    """
    return {name: tensor for name, tensor in all_parameters(chunks).items() if ADAPTER not in name}


def adapter_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """A and B of this rank's adapters, by global name (bridge.lora.Target.parameter)."""
    return {name: tensor for name, tensor in all_parameters(chunks).items() if ADAPTER in name}


def all_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Both. No rank is without one: a pipeline stage may have no adapter."""
    found: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        # Looked at once: a walk over the modules of many experts takes its time.
        modules = dict(chunk.named_modules())
        rename = _Names(modules)
        for name, tensor in _tensors(chunk, modules):
            found[rename(name)] = tensor
    return found


def _tensors(
    chunk: torch.nn.Module, modules: Mapping[str, torch.nn.Module]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield from chunk.named_parameters()
    for path, module in modules.items():
        if path.endswith("router"):
            for name, buffer in module.named_buffers(path, recurse=False):
                if name.endswith("router.expert_bias"):
                    yield name, buffer


class _Names:
    """Global names of one chunk's parameters."""

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._layers: dict[str, int] = {}
        self._experts: dict[str, list[int]] = {}
        for name, module in modules.items():
            if _LAYER_MODULE.fullmatch(name):
                number: int = module.layer_number  # pyright: ignore[reportAssignmentType]
                self._layers[_unwrapped(name)] = number - 1
            if name.endswith(".mlp.experts"):
                layer = modules[name.removesuffix(".experts")]
                self._experts[_one_name(name)] = layer.local_expert_indices  # pyright: ignore[reportArgumentType]

    def __call__(self, name: str) -> str:
        name = _one_name(name)
        prefix, experts, rest = name.partition(".mlp.experts.")
        if experts:
            indices = self._experts[prefix + ".mlp.experts"]
            rest = _GROUPED_EXPERT.sub(r"local_experts.\3.\1.\2", rest)
            rest = _LOCAL_EXPERT.sub(lambda match: f"local_experts.{indices[int(match[1])]}.", rest)
        name = _unwrapped(prefix) + experts + rest
        match = _LAYER.match(name)
        if match is None:
            return name
        return f"decoder.layers.{self._layers[match[0][:-1]]}.{name[match.end() :]}"


def _one_name(name: str) -> str:
    for theirs, ours in _SAME:
        name = name.replace(theirs, ours)
    return name


def _unwrapped(name: str) -> str:
    """Without the prefixes of data-parallel and mixed-precision wrappers."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def claim_pieces(
    family: Family,
    spec: MegatronSpec,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, TensorInfo] | None,
    place: Place,
) -> Claims:
    """What the rank at `place` holds of the checkpoint's `tensors`, or, without any, of those the model implies.

    Raises MisfitError listing every parameter without a rule, every HF tensor that is missing and every shape
    that does not fit, before a byte is read.
    """
    pieces: list[Piece] = []
    shapes: dict[str, Shape] = {}
    full_precision: set[str] = set()
    wrong: list[str] = []
    read: set[str] = set()
    for name, parameter in parameters.items():
        copy = name == OUTPUT_LAYER and spec.tie_word_embeddings
        matches = family.matches(EMBEDDING if copy else name, spec.num_layers)
        if not matches:
            wrong.append(f"Megatron parameter {name} has no rule")
            continue
        fits = [
            _fit(spec, name, match, parameter, place, tensors) for match in possible_rules(matches, tensors)
        ]
        match, layout, shard, full, problem = next((fit for fit in fits if fit.problem is None), fits[0])
        read.update(match.hf_names)
        if problem:
            wrong.append(f"{name}: {problem}")
            continue
        shapes.update(zip(match.hf_names, full, strict=True))
        if name.endswith("router.expert_bias"):
            full_precision.update(match.hf_names)
        pieces += [
            Piece(
                tensor=match.hf_names[cut.source],
                region=cut.hf_region,
                rank=place.rank,
                parameter=name,
                local_region=cut.local_region,
                fold=cut.fold,
                copy=copy,
            )
            for cut in layout.cuts(full, shard)
        ]
    if wrong:
        raise MisfitError(tuple(wrong), frozenset(read))
    return Claims(pieces=tuple(pieces), shapes=shapes, full_precision=frozenset(full_precision))


def possible_rules(matches: Sequence[Match], tensors: Mapping[str, TensorInfo] | None) -> list[Match]:
    """The alternatives whose tensors are all there; the first one where that is not known, or none is."""
    if tensors is None or len(matches) == 1:
        return [matches[0]]
    found = [match for match in matches if all(name in tensors for name in match.hf_names)]
    return found or [matches[0]]


class _Fit(NamedTuple):
    """An alternative for a parameter: how it is cut, what HF shapes that makes, and why it cannot be."""

    match: Match
    layout: Layout
    shard: Shard
    full: tuple[Shape, ...]
    problem: str | None


def _fit(
    spec: MegatronSpec,
    name: str,
    match: Match,
    parameter: torch.Tensor,
    place: Place,
    tensors: Mapping[str, TensorInfo] | None,
) -> _Fit:
    layout, shard, problem = layout_for(spec, name, match, parameter, place)
    full = layout.shapes(tuple(parameter.shape), shard)
    return _Fit(match, layout, shard, full, problem or _misfit(match.hf_names, full, tensors))


def layout_for(
    spec: MegatronSpec, name: str, match: Match, parameter: torch.Tensor, place: Place
) -> tuple[Layout, Shard, str | None]:
    """The rule's layout as it is for this parameter, its shard, and why they cannot be, if they cannot."""
    expert = ".mlp.experts." in name
    shard = Shard(
        rank=place.expert_tensor_rank if expert else place.tensor_rank,
        size=place.expert_tensor_size if expert else place.tensor_size,
        num_query_groups=spec.num_query_groups,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        num_experts=spec.num_experts,
        expert=match.expert,
    )
    layout = match.rule.layout
    split = tensor_parallel_dim(parameter)
    if split is None and isinstance(layout, Column):
        layout = Replicated()
    if isinstance(layout, Vocabulary):
        shard = replace(shard, padded_vocab_size=parameter.shape[0] * shard.size)
    if shard.size > 1 and split != layout.parallel_dim:
        return layout, shard, f"Megatron splits dimension {split}, the rule {layout.parallel_dim}"
    return layout, shard, None


def _misfit(
    names: Sequence[str], full: Sequence[Shape], tensors: Mapping[str, TensorInfo] | None
) -> str | None:
    if tensors is None:
        return None
    missing = [name for name in names if name not in tensors]
    if missing:
        return f"the checkpoint does not have {', '.join(missing)}"
    wrong = [
        f"{name} is {list(tensors[name].shape)} in the checkpoint, the model needs {list(shape)}"
        for name, shape in zip(names, full, strict=True)
        if tensors[name].shape != shape
    ]
    return "; ".join(wrong) or None


def tensor_parallel_dim(parameter: torch.Tensor) -> int | None:
    """The dimension that Megatron splits over tensor-parallel ranks, from the attributes it sets."""
    # Megatron leaves the attributes off parameters that are not split. An expert's bias may have the first one
    # alone: it is whole, but has to be counted on every rank.
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return getattr(parameter, "partition_dim", None)


def hf_order(pieces: Iterable[Piece]) -> list[str]:
    """HF names in layer order: embedding, layers by number, MTP layers, final norm and head."""
    keys: dict[str, tuple[int, int]] = {}
    for position, piece in enumerate(pieces):
        keys.setdefault(piece.tensor, (_stage(piece.parameter), position))
    return sorted(keys, key=lambda name: keys[name])


def _stage(parameter: str) -> int:
    for pattern, first in ((_LAYER, 1), (_MTP, 1 << 29)):
        match = pattern.match(parameter)
        if match:
            return int(match[1]) + first
    return 1 << 30 if parameter.startswith(("decoder.", "output_layer.", "mtp.")) else 0
