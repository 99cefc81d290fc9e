"""A live Megatron model's parameters as shards of Hugging Face tensors."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence

import torch

from bridge.checkpoint import CheckpointError, CheckpointReader
from bridge.layouts import Shape, Shard, padded_vocabulary, region_numel, slices
from bridge.plan import Piece, TensorInfo
from bridge.rules import Family, MegatronSpec, Rule, RuleError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def named_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank's model chunks by global name.

    The global layer number comes from the layer itself, so it holds under any pipeline split.
    """
    found: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        numbers = {
            name: int(module.layer_number) - 1  # pyright: ignore[reportArgumentType]
            for name, module in chunk.named_modules()
            if re.fullmatch(r"decoder\.layers\.\d+", name)
        }
        for name, parameter in chunk.named_parameters():
            match = _LAYER.match(name)
            if match:
                layer = numbers[match.group(0)[:-1]]
                name = f"decoder.layers.{layer}.{name[match.end() :]}"  # noqa: PLW2901
            found[name] = parameter
    return found


def claim_pieces(
    family: Family,
    spec: MegatronSpec,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, TensorInfo],
    *,
    rank: int,
    tensor_parallel_rank: int,
    tensor_parallel_size: int,
) -> list[Piece]:
    """What this rank holds of the HF `tensors`, in the order of its parameters.

    Raises RuleError listing every parameter without a rule, every HF tensor that is missing and every shape
    that does not fit, before a byte is read.
    """
    shard = Shard(
        rank=tensor_parallel_rank,
        size=tensor_parallel_size,
        num_query_groups=spec.num_query_groups,
        head_dim=spec.head_dim,
    )
    pieces: list[Piece] = []
    wrong: list[str] = []
    for name, parameter in parameters.items():
        matched = family.rule_for(name)
        if matched is None:
            wrong.append(f"Megatron parameter {name} has no rule")
            continue
        rule, hf_names = matched
        copy = name == "output_layer.weight" and spec.tie_word_embeddings
        if copy:
            hf_names = ("model.embed_tokens.weight",)
        missing = [hf_name for hf_name in hf_names if hf_name not in tensors]
        if missing:
            wrong.append(f"{name} needs {', '.join(missing)}, which the checkpoint does not have")
            continue
        shapes = [tensors[hf_name].shape for hf_name in hf_names]
        problem = _misfit(rule, parameter, shapes, shard)
        if problem:
            wrong.append(f"{name} and {', '.join(hf_names)} {shapes}: {problem}")
            continue
        pieces += [
            Piece(
                tensor=hf_names[cut.source],
                region=cut.hf_region,
                rank=rank,
                parameter=name,
                local_region=cut.local_region,
                copy=copy,
            )
            for cut in rule.layout.cuts(shapes, shard)
        ]
    if wrong:
        raise RuleError("the checkpoint does not fit the model:\n  " + "\n  ".join(wrong))
    return pieces


def _misfit(rule: Rule, parameter: torch.nn.Parameter, shapes: Sequence[Shape], shard: Shard) -> str | None:
    """Why the parameter cannot be what the rule says, if it cannot."""
    split = tensor_parallel_dim(parameter)
    if shard.size > 1 and split != rule.layout.parallel_dim:
        return f"Megatron splits dimension {split}, the rule {rule.layout.parallel_dim}"
    cuts = rule.layout.cuts(shapes, shard)
    covered = sum(region_numel(cut.local_region) for cut in cuts)
    if rule.hf[0] in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = padded_vocabulary(shapes[0][0], shard.size) // shard.size
        covered = rows * shapes[0][1]
    if covered != parameter.numel():
        return f"the rank's share has {covered} elements, the parameter {tuple(parameter.shape)}"
    return None


def tensor_parallel_dim(parameter: torch.nn.Parameter) -> int | None:
    """The dimension that Megatron splits over tensor-parallel ranks, from the attributes it sets."""
    # Megatron leaves the attribute off parameters that are not split.
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return parameter.partition_dim  # pyright: ignore[reportAttributeAccessIssue]


def check_all_read(names: Iterable[str], read: Container[str]) -> None:
    """Raises RuleError listing the HF tensors in `names` that no rank has read."""
    unread = [name for name in names if name not in read]
    if unread:
        raise RuleError(f"no rule reads these tensors of the checkpoint: {', '.join(unread)}")


@torch.no_grad()
def load_pieces(
    parameters: Mapping[str, torch.nn.Parameter], reader: CheckpointReader, pieces: Iterable[Piece]
) -> None:
    """Read each piece from its file into its parameter; padding of the vocabulary becomes zero."""
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in parameters:
            parameters[name].zero_()
    for piece in pieces:
        value = reader.read(piece.tensor, piece.region)
        target = parameters[piece.parameter][slices(piece.local_region)]
        if value.shape != target.shape:
            raise CheckpointError(f"{piece.tensor}: read {tuple(value.shape)}, wanted {tuple(target.shape)}")
        target.copy_(value)


def hf_order(pieces: Iterable[Piece]) -> list[str]:
    """HF names in layer order: embedding, layers by number, final norm and head."""
    keys: dict[str, tuple[int, int]] = {}
    for position, piece in enumerate(pieces):
        match = _LAYER.match(piece.parameter)
        stage = (
            int(match.group(1)) + 1 if match else (0 if piece.parameter.startswith("embedding") else 1 << 30)
        )
        keys.setdefault(piece.tensor, (stage, position))
    return sorted(keys, key=lambda name: keys[name])
