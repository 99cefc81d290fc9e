"""Adapters cut for ranks and merged, against peft's own merge of the same adapter on the transformers model."""

import copy
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from bridge.adapter_bridge import adapted_modules
from bridge.adapter_config import ADAPTER_WEIGHTS, AdapterConfig, read_adapter_config
from bridge.families import spec_of
from bridge.lora import Target, adapter_claims, targets_of
from bridge.megatron import Place
from bridge.merged import MergedParameters
from bridge.plan import TensorInfo, build_plan
from bridge.rules import Family, MegatronSpec
from configs.errors import ConfigError
from tests.bridge.family_models import CONFIGS, build, megatron_shard, megatron_tensors, save

EXPERT_RANK, EXPERT_ALPHA = 3, 12.0
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LATENT = [
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]
CASES: dict[str, dict[str, Any]] = {
    "llama": {
        "target_modules": [*EVERYTHING, "lm_head", "embed_tokens"],
        "rank_pattern": {"k_proj": 2, "layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"k_proj": 3, "up_proj": 5},
    },
    "llama tied": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "layers_to_transform": [1]},
    "llama with biases": {"target_modules": r".*\.(k_proj|o_proj|gate_proj)"},
    "qwen3_moe": {"target_modules": r".*self_attn\.[qkvo]_proj"},
    "deepseek_v3": {"target_modules": r".*self_attn\.\w+_(proj|mqa)"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, an adapter of it as peft has written it, and both merged, in Megatron's whole tensors."""

    family: Family
    spec: MegatronSpec
    adapter: Path
    tensors: dict[str, torch.Tensor]
    whole: dict[str, torch.Tensor]
    merged: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp("lora")
    torch.manual_seed(1)
    model = build(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save(model, config, folder / "model")
    family, spec = spec_of(folder / "model")
    adapted = copy.deepcopy(model)
    settings = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **CASES[request.param])
    adapted = peft.get_peft_model(adapted, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    with warnings.catch_warnings():
        # peft says that it stores an adapted embedding's own weights as well.
        warnings.simplefilter("ignore", UserWarning)
        adapted.save_pretrained(folder / "adapter")
    tensors = load_file(folder / "adapter" / ADAPTER_WEIGHTS)
    # What peft adapts of layers for multi-token prediction is not in the models that are trained.
    tensors = {name: tensor for name, tensor in tensors.items() if f"layers.{spec.num_layers}." not in name}
    merged = adapted.merge_and_unload()
    if spec.num_experts:
        tensors |= adapt_experts(merged, spec.num_layers)
    return Case(
        family=family,
        spec=spec,
        adapter=folder / "adapter",
        tensors={name: tensor for name, tensor in tensors.items() if "base_layer" not in name},
        whole=megatron_tensors(model, config),
        merged=megatron_tensors(merged, config),
    )


def adapt_experts(model: Any, num_layers: int) -> dict[str, torch.Tensor]:
    """Adds random adapters to all experts, which peft cannot as transformers packs them; returns their tensors."""
    found: dict[str, torch.Tensor] = {}
    scale = EXPERT_ALPHA / EXPERT_RANK
    for number, layer in enumerate(model.model.layers[:num_layers]):
        if not hasattr(layer.mlp, "experts"):
            continue
        packed = layer.mlp.experts
        size = packed.gate_up_proj.shape[1] // 2
        for expert in range(packed.num_experts):
            views = {
                "gate_proj": packed.gate_up_proj[expert, :size],
                "up_proj": packed.gate_up_proj[expert, size:],
                "down_proj": packed.down_proj[expert],
            }
            for leaf, view in views.items():
                left, right = torch.randn(EXPERT_RANK, view.shape[1]), torch.randn(view.shape[0], EXPERT_RANK)
                view.data += scale * right @ left
                module = f"base_model.model.model.layers.{number}.mlp.experts.{expert}.{leaf}"
                found |= {f"{module}.lora_A.weight": left, f"{module}.lora_B.weight": right}
    return found


def config_of(case: Case) -> AdapterConfig:
    config = read_adapter_config(case.adapter)
    patterns = {rf".*\.experts\.\d+\.{leaf}": EXPERT_RANK for leaf in ("gate_proj", "up_proj", "down_proj")}
    alphas = dict.fromkeys(patterns, EXPERT_ALPHA)
    return replace(
        config,
        rank_pattern={**patterns, **config.rank_pattern},
        alpha_pattern={**alphas, **config.alpha_pattern},
    )


def shard(
    tensors: dict[str, torch.Tensor], rank: int, size: int, with_mtp: bool = False
) -> dict[str, torch.Tensor]:
    """One rank's parameters, marked as Megatron marks them."""
    found: dict[str, torch.Tensor] = {}
    for name, whole in tensors.items():
        if name.startswith("mtp."):
            continue
        local = megatron_shard(name, whole, rank, size).clone()
        other = megatron_shard(name, whole, size - 1, size)
        flat = whole.flatten(0, 1) if "linear_fc1.weight" in name else whole
        if size > 1 and (local.shape != flat.shape or not torch.equal(local, other)):
            marks: Any = local
            marks.tensor_model_parallel = True
            marks.partition_dim = next(
                (dim for dim, (a, b) in enumerate(zip(local.shape, flat.shape, strict=True)) if a != b), 0
            )
        found[name] = local
    return found


def place(rank: int, size: int) -> Place:
    return Place(
        rank=rank, tensor_rank=rank, tensor_size=size, expert_tensor_rank=rank, expert_tensor_size=size
    )


def targets(case: Case, parameters: dict[str, torch.Tensor], at: Place) -> tuple[Target, ...]:
    return targets_of(
        case.family, case.spec, parameters, at, config_of(case), adapted_modules(dict(case.tensors))
    )


def load(case: Case, found: tuple[Target, ...], rank: int) -> dict[str, torch.Tensor]:
    """This rank's A and B, each element from its place in peft's tensors."""
    adapters = {
        target.parameter(part, factor): torch.zeros(part.shape(factor))
        for target in found
        for part in target.parts
        for factor in ("A", "B")
    }
    for piece in adapter_claims(found, rank).pieces:
        region = tuple(slice(start, stop) for start, stop in piece.region)
        piece.put(adapters[piece.parameter], case.tensors[piece.tensor][region])
    return adapters


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_every_rank_merges_its_part_alone_as_peft_merges_the_whole(case: Case, size: int) -> None:
    inputs = case.whole.get("decoder.layers.0.self_attention.linear_qkv.weight")
    if inputs is not None and len(inputs) % size:
        pytest.skip("no such layout of this model")
    for rank in range(size):
        parameters = shard(case.whole, rank, size)
        expected = shard(case.merged, rank, size)
        found = targets(case, parameters, place(rank, size))
        merged = MergedParameters(parameters, load(case, found, rank), found)
        assert merged.keys() == expected.keys()
        changed = {target.weight for target in found}
        for name, tensor in expected.items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-4)
            assert torch.equal(parameters[name], shard(case.whole, rank, size)[name])
            if name not in changed:
                assert torch.equal(tensor, parameters[name])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_together_have_exactly_pefts_tensors(case: Case, size: int) -> None:
    claims = []
    for rank in range(size):
        found = targets(case, shard(case.whole, rank, size), place(rank, size))
        claims.append(adapter_claims(found, rank))
    shapes = {name: shape for claim in claims for name, shape in claim.shapes.items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in case.tensors.items()}
    infos = [TensorInfo(name=name, dtype=torch.float32, shape=shape) for name, shape in shapes.items()]
    # It raises where a region has no owner, or more than one.
    build_plan(infos, [piece for claim in claims for piece in claim.pieces])


def test_the_config_targets_what_peft_targets(case: Case) -> None:
    at = place(0, 1)
    parameters = shard(case.whole, 0, 1)
    found = targets_of(case.family, case.spec, parameters, at, read_adapter_config(case.adapter))
    modules = {part.module for target in found for part in target.parts}
    # As transformers packs experts, peft cannot adapt them, whatever they are called on disk.
    assert {name for name in modules if ".experts." not in name} == {
        name for name in adapted_modules(dict(case.tensors)) if ".experts." not in name
    }


def test_all_linear_leaves_out_routers_embedding_and_head(case: Case) -> None:
    config = AdapterConfig(r=4, lora_alpha=8.0, target_modules="all-linear")
    found = targets_of(case.family, case.spec, shard(case.whole, 0, 1), place(0, 1), config)
    leaves = {part.leaf for target in found for part in target.parts}
    wanted = set(LATENT if case.spec.transformer.get("multi_latent_attention") else EVERYTHING)
    assert leaves == wanted
    experts = [target for target in found if ".local_experts." in target.weight]
    assert bool(experts) == bool(case.spec.num_experts)


def test_a_tied_matrix_and_packed_experts_are_refused(tmp_path: Path) -> None:
    for name, module, words in (
        ("llama tied", "embed_tokens", "model.embed_tokens is tied to another matrix"),
        ("gpt_oss", "gate_up_proj", "hold all experts in one tensor"),
    ):
        config = CONFIGS[name]
        model = build(config)
        save(model, config, tmp_path / name)
        family, spec = spec_of(tmp_path / name)
        adapter = AdapterConfig(r=4, lora_alpha=8.0, target_modules=(module,))
        parameters = {
            name: tensor.flatten(0, 1) if "linear_fc1.weight" in name else tensor
            for name, tensor in megatron_tensors(model, config).items()
        }
        with pytest.raises(ConfigError, match=words):
            targets_of(family, spec, parameters, place(0, 1), adapter)
