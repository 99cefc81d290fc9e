"""Every family's table against transformers: names on disk, and weights converted by hand."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_layers import MtpModel

from bridge.families import FAMILIES, spec_of
from bridge.layouts import Cut, Shard, slices
from bridge.rules import Family, Match, MegatronSpec
from tests.bridge.family_models import (
    CONFIGS,
    build,
    decoder_layer,
    extra_tensors,
    megatron_shard,
    megatron_tensors,
    save,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A family's tiny model: on disk, as transformers holds it, and as Megatron's whole tensors."""

    family: Family
    spec: MegatronSpec
    disk: dict[str, torch.Tensor]
    memory: dict[str, torch.Tensor]
    whole: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    config = CONFIGS[request.param]
    directory = tmp_path_factory.mktemp("model")
    model = build(config)
    save(model, config, directory)
    family, spec = spec_of(directory)
    return Case(
        family=family,
        spec=spec,
        disk=load_file(directory / "model.safetensors"),
        memory=dict(model.state_dict()) | extra_tensors(model, config),
        whole=megatron_tensors(model, config),
    )


def chosen(case: Case, name: str, tensors: dict[str, torch.Tensor]) -> Match:
    local = tuple(megatron_shard(name, case.whole[name], 0, 1).shape)
    return next(
        match
        for match in case.family.matches(name, case.spec.num_layers)
        if all(hf_name in tensors for hf_name in match.hf_names)
        if match.rule.layout.shapes(local, shard_of(case, match, 0, 1))
        == tuple(tuple(tensors[hf_name].shape) for hf_name in match.hf_names)
    )


def test_every_family_has_a_case() -> None:
    covered = {config.model_type for config in CONFIGS.values()}
    assert covered == {name for family in FAMILIES for name in family.model_types}


@pytest.mark.parametrize("form", ["disk", "memory"])
def test_every_tensor_is_read_by_a_rule_or_is_a_copy(case: Case, form: str) -> None:
    tensors = case.disk if form == "disk" else case.memory
    read = [hf_name for name in case.whole for hf_name in set(chosen(case, name, tensors).hf_names)]
    copies = case.family.copies_in(case.spec, tensors)
    assert set(read) | set(copies) == set(tensors)
    assert not set(read) & set(copies)
    for name, original in copies.items():
        assert torch.equal(tensors[name], tensors[original])


def test_a_disk_without_tensors_is_written_as_the_authors_write_it(case: Case) -> None:
    names = {
        hf_name
        for name in case.whole
        for hf_name in case.family.matches(name, case.spec.num_layers)[0].hf_names
    }
    # Models that see have two generations of names on disk; it is the one of transformers' modules.
    written = case.disk if case.spec.vision is None else case.memory
    assert names == set(written) - set(case.family.copies_in(case.spec, written))


def test_extra_layers_are_those_of_multi_token_prediction(case: Case) -> None:
    extra = {name for name in case.disk if case.family.is_extra_layer(case.spec, name)}
    assert extra == {name for name in case.disk if name.startswith(f"model.layers.{case.spec.num_layers}.")}
    assert bool(extra) == any(name.startswith("mtp.") for name in case.whole)


def shard_of(case: Case, match: Match, rank: int, size: int) -> Shard:
    return Shard(
        rank=rank,
        size=size,
        num_query_groups=case.spec.num_query_groups,
        head_dim=case.spec.head_dim,
        vocab_size=case.spec.vocab_size,
        num_experts=case.spec.num_experts,
        expert=match.expert,
    )


def put(local: torch.Tensor, cut: Cut, source: torch.Tensor) -> None:
    """Copy what one cut names; NaN marks what no cut has written yet."""
    box, part = local[slices(cut.local_region)], source[slices(cut.hf_region)]
    assert box.isnan().all()
    if cut.fold is None:
        box.copy_(part.reshape(box.shape))
        return
    permuted = [cut.fold.split[dim] for dim in cut.fold.order]
    back = [cut.fold.order.index(dim) for dim in range(len(permuted))]
    box.copy_(part.reshape(permuted).permute(back).reshape(box.shape))


def fits(groups: int, name: str, whole: torch.Tensor, size: int) -> bool:
    """Whether Megatron can split the parameter like this."""
    if "linear_qkv" not in name:
        return True
    return len(whole) % size == 0 and (groups % size == 0 or size % groups == 0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("form", ["disk", "memory"])
def test_cuts_make_the_shards_converted_by_hand(case: Case, form: str, size: int) -> None:
    tensors = case.disk if form == "disk" else case.memory
    for name, whole in case.whole.items():
        if not fits(case.spec.num_query_groups, name, whole, size):
            continue
        match = chosen(case, name, tensors)
        sources = [tensors[hf_name] for hf_name in match.hf_names]
        shapes = tuple(tuple(source.shape) for source in sources)
        for rank in range(size):
            shard = shard_of(case, match, rank, size)
            expected = megatron_shard(name, whole, rank, size)
            assert match.rule.layout.shapes(tuple(expected.shape), shard) == shapes, name
            local = torch.full_like(expected, math.nan)
            for cut in match.rule.layout.cuts(shapes, shard):
                put(local, cut, sources[cut.source])
            if "word_embeddings" in name or name == "output_layer.weight":
                # No cut writes the padding.
                local.nan_to_num_(0)
            assert torch.equal(local, expected), f"{name}, rank {rank}"


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_transformers_reads_the_extra_layers_of_these_tests_as_they_are_meant(
    name: str, tmp_path: Path
) -> None:
    config = CONFIGS[name]
    model = build(config)
    save(model, config, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    # transformers knows which layers are extra only for released models, by their numbers.
    loaded._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."]
    (extra,) = MtpModel.from_pretrained(loaded).layers
    whole = megatron_tensors(model, config)
    for ours, theirs in (
        ("enorm", extra.enorm),
        ("hnorm", extra.hnorm),
        ("eh_proj", extra.eh_proj),
        ("final_layernorm", extra.post_norm),
    ):
        assert torch.equal(whole[f"mtp.layers.0.{ours}.weight"], theirs.weight)
    inner = decoder_layer(extra.mtp_block, config)
    prefix = "mtp.layers.0.transformer_layer."
    assert inner.keys() == {name.removeprefix(prefix) for name in whole if name.startswith(prefix)}
    for key, tensor in inner.items():
        assert torch.equal(whole[prefix + key], tensor)
