"""Where LoRA adapters sit in a Megatron model, by the same rules as the weights they adapt.

A Megatron linear that is made of several Hugging Face ones (queries, keys and values; gate and up) has an
adapter for each of them, as PEFT does: A and B are then trained, read and written exactly as there.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from bridge.adapter_config import ALL_LINEAR, AdapterConfig
from bridge.layouts import Cut, Shape, Vocabulary, region_of
from bridge.megatron import ADAPTER, EMBEDDING, OUTPUT_LAYER, Claims, Place, layout_for
from bridge.plan import Piece
from bridge.rules import Family, MegatronSpec
from bridge.vision import TOWER, tower_linears
from configs.errors import ConfigError

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows [hf, hf + count) of an HF weight are rows [local, local + count) of this rank's Megatron weight."""

    hf: int
    local: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One HF linear in a Megatron weight, and this rank's part of its adapter.

    With W [out, in] the HF weight and W + scale * B A the adapted one, this rank has columns `columns` of A
    [rank, in] and `rows` of B [out, rank], one after the other. An embedding's weight is W transposed: there
    `in` is the vocabulary.
    """

    module: str
    """Path of the HF module: `model.layers.3.self_attn.q_proj`."""
    rank: int
    scale: float
    dropout: float
    out_features: int
    in_features: int
    rows: tuple[Rows, ...]
    columns: tuple[int, int]
    local_in: int
    """Columns of A on this rank; with padding of the vocabulary more than `columns`."""

    @property
    def leaf(self) -> str:
        """Last name of the module; the key among the adapters of a Megatron linear."""
        return self.module.rpartition(".")[2]

    def shape(self, factor: Literal["A", "B"]) -> Shape:
        """Of this rank's A or B."""
        if factor == "A":
            return self.rank, self.local_in
        return sum(rows.count for rows in self.rows), self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A Megatron weight with adapters."""

    weight: str
    """Global name, as bridge.megatron.named_parameters gives it."""
    parts: tuple[Part, ...]

    @property
    def is_embedding(self) -> bool:
        """Whether the weight is looked up, not multiplied with."""
        return self.weight == EMBEDDING

    def parameter(self, part: Part, factor: Literal["A", "B"]) -> str:
        """Global name of A or B of a part."""
        return f"{self.weight.removesuffix('.weight')}{ADAPTER}{part.leaf}.{factor}"


def targets_of(
    family: Family,
    spec: MegatronSpec,
    parameters: Mapping[str, torch.Tensor],
    place: Place,
    config: AdapterConfig,
    modules: Collection[str] | None = None,
) -> tuple[Target, ...]:
    """What of this rank's base `parameters` (global names) is adapted, in their order; nothing is created.

    That are `modules`, where it is known which, else what the config targets. `all-linear` are the linears of
    attention, MLPs and experts, and those of the vision tower: not the router, embedding or head. Raises
    ConfigError when a weight is to be adapted whose adapter PEFT could not have.
    """
    found: list[Target] = []
    tower = tower_linears(spec.vision) if spec.vision is not None else frozenset[str]()
    for name, parameter in parameters.items():
        # What PEFT adapts has no layers for multi-token prediction.
        if not name.endswith(".weight") or parameter.dim() != 2 or name.startswith("mtp."):
            continue
        if name.startswith(TOWER) and name not in tower:
            continue
        # Alternatives name or pack the same weights otherwise; the first has a tensor for every linear.
        match = family.matches(name, spec.num_layers)[0]
        linears = [hf.removesuffix(".weight") for hf in match.hf_names]
        chosen = [
            _is_chosen(config, name, match.rule.layout, linear) if modules is None else linear in modules
            for linear in linears
        ]
        if not any(chosen):
            continue
        layout, shard, _ = layout_for(spec, name, match, parameter, place)
        shapes = layout.shapes(tuple(parameter.shape), shard)
        if any(len(shape) != 2 for shape in shapes):
            raise ConfigError(
                f"target_modules: {', '.join(linears)} hold all experts in one tensor, which cannot be adapted"
            )
        if spec.tie_word_embeddings and name in (EMBEDDING, OUTPUT_LAYER):
            raise ConfigError(
                f"target_modules: {', '.join(linears)} is tied to another matrix of this model; leave it out"
            )
        cuts = layout.cuts(shapes, shard)
        parts = tuple(
            _part(config, name, module, shapes[source], tuple(parameter.shape), _of(cuts, source))
            for source, module in enumerate(linears)
            if chosen[source]
        )
        found.append(Target(weight=name, parts=parts))
    return tuple(found)


def _is_chosen(config: AdapterConfig, name: str, layout: object, module: str) -> bool:
    if config.target_modules == ALL_LINEAR and (isinstance(layout, Vocabulary) or ".router." in name):
        return False
    return config.targets(module)


def _of(cuts: Sequence[Cut], source: int) -> list[Cut]:
    return sorted((cut for cut in cuts if cut.source == source), key=lambda cut: cut.hf_region)


def _part(
    config: AdapterConfig, name: str, module: str, full: Shape, local: Shape, cuts: Sequence[Cut]
) -> Part:
    rows: list[Rows] = []
    for cut in cuts:
        (start, stop), (first, _) = cut.hf_region[0], cut.local_region[0]
        last = rows[-1] if rows else None
        if last is not None and (last.hf + last.count, last.local + last.count) == (start, first):
            rows[-1] = Rows(hf=last.hf, local=last.local, count=last.count + stop - start)
        else:
            rows.append(Rows(hf=start, local=first, count=stop - start))
    columns = cuts[0].hf_region[1] if cuts else (0, full[1])
    sizes, local_in = full, local[1]
    if name == EMBEDDING:
        held = (rows[0].hf, rows[0].hf + rows[0].count) if rows else (0, 0)
        rows, columns = [Rows(hf=0, local=0, count=full[1])], held
        sizes, local_in = full[::-1], local[0]
    return Part(
        module=module,
        rank=config.rank_of(module),
        scale=config.scale_of(module),
        dropout=config.lora_dropout,
        out_features=sizes[0],
        in_features=sizes[1],
        rows=tuple(rows),
        columns=columns,
        local_in=local_in,
    )


def keys_of(target: Target, part: Part) -> tuple[str, str]:
    """PEFT's names of A and B."""
    if target.is_embedding:
        return f"{PREFIX}{part.module}.lora_embedding_A", f"{PREFIX}{part.module}.lora_embedding_B"
    return f"{PREFIX}{part.module}.lora_A.weight", f"{PREFIX}{part.module}.lora_B.weight"


def adapter_claims(targets: Sequence[Target], rank: int) -> Claims:
    """What this rank (its number among all) holds of the adapter's tensors, under PEFT's names."""
    pieces: list[Piece] = []
    shapes: dict[str, Shape] = {}
    for target in targets:
        for part in target.parts:
            key_A, key_B = keys_of(target, part)
            shapes[key_A] = (part.rank, part.in_features)
            shapes[key_B] = (part.out_features, part.rank)
            start, stop = part.columns
            if start < stop:
                pieces.append(
                    Piece(
                        tensor=key_A,
                        region=((0, part.rank), (start, stop)),
                        rank=rank,
                        parameter=target.parameter(part, "A"),
                        local_region=region_of((part.rank, stop - start)),
                    )
                )
            position = 0
            for rows in part.rows:
                pieces.append(
                    Piece(
                        tensor=key_B,
                        region=((rows.hf, rows.hf + rows.count), (0, part.rank)),
                        rank=rank,
                        parameter=target.parameter(part, "B"),
                        local_region=((position, position + rows.count), (0, part.rank)),
                    )
                )
                position += rows.count
    return Claims(pieces=tuple(pieces), shapes=shapes, full_precision=frozenset())
