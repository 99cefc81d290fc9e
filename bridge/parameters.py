"""The parameters that Megatron makes for a model, without Megatron, and whether a checkpoint has them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bridge.claims import check_all_read, merge_claims, try_to_claim
from bridge.fit import moe_pattern
from bridge.layouts import Shape
from bridge.megatron import Place
from bridge.plan import TensorInfo
from bridge.rules import Family, MegatronSpec
from bridge.vision import TOWER, build_tower

Named = Iterator[tuple[str, Shape]]
ALONE = Place(rank=0, tensor_rank=0, tensor_size=1, expert_tensor_rank=0, expert_tensor_size=1)
"""Where a rank stands that has the whole model."""


def parameters_of(spec: MegatronSpec, *, mtp: bool) -> dict[str, Shape]:
    """Global names and whole shapes, as bridge.megatron.named_parameters gives them to one rank alone.

    With `mtp` also those of the layers for multi-token prediction.
    """
    hidden = spec.transformer["hidden_size"]
    moe = moe_pattern(spec)
    found: dict[str, Shape] = {"embedding.word_embeddings.weight": (spec.vocab_size, hidden)}
    for number, with_experts in enumerate(moe):
        found.update(_under(f"decoder.layers.{number}.", _layer(spec, with_experts=with_experts)))
    found["decoder.final_layernorm.weight"] = (hidden,)
    for number in range(spec.mtp_layers if mtp else 0):
        found.update(_under(f"mtp.layers.{number}.", _mtp_layer(spec, with_experts=moe[-1])))
    if not spec.tie_word_embeddings:
        found["output_layer.weight"] = (spec.vocab_size, hidden)
    if spec.vision is not None:
        tower = build_tower(spec.vision, "meta")
        found.update({f"{TOWER}{name}": tuple(p.shape) for name, p in tower.named_parameters()})
    return found


def check_tensors(
    family: Family,
    spec: MegatronSpec,
    tensors: Mapping[str, TensorInfo],
    directory: Path,
    *,
    mtp: bool,
) -> None:
    """Raises RuleError naming the directory and listing everything in names and shapes that does not fit.

    What ModelBridge.load would say once its ranks are up, from the headers of the files alone. `mtp`: whether
    the model is to have its layers for multi-token prediction.
    """
    shapes = parameters_of(spec, mtp=mtp)
    parameters = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = try_to_claim(family, spec, parameters, tensors, ALONE)
    claims = merge_claims(family, spec, tensors, [found], directory, with_mtp=mtp)
    check_all_read(family, spec, tensors, claims, directory, with_mtp=mtp)


def _under(prefix: str, parameters: Named) -> Named:
    for name, shape in parameters:
        yield prefix + name, shape


def _layer(spec: MegatronSpec, *, with_experts: bool) -> Named:
    shape = spec.transformer
    hidden = shape["hidden_size"]
    yield "input_layernorm.weight", (hidden,)
    latent = shape.get("multi_latent_attention")
    yield from _under("self_attention.", _latent_attention(shape) if latent else _attention(spec))
    yield "pre_mlp_layernorm.weight", (hidden,)
    yield from _under("mlp.", _experts(shape) if with_experts else _dense_mlp(spec))


def _mtp_layer(spec: MegatronSpec, *, with_experts: bool) -> Named:
    hidden = spec.transformer["hidden_size"]
    yield "eh_proj.weight", (hidden, 2 * hidden)
    for norm in ("enorm", "hnorm", "final_layernorm"):
        yield f"{norm}.weight", (hidden,)
    yield from _under("transformer_layer.", _layer(spec, with_experts=with_experts))


def _attention(spec: MegatronSpec) -> Named:
    shape, hidden, size = spec.transformer, spec.transformer["hidden_size"], spec.head_dim
    heads, biases = shape["num_attention_heads"], shape["add_bias_linear"]
    rows = (heads + 2 * spec.num_query_groups) * size
    yield from _linear("linear_qkv", rows, hidden, bias=biases or shape["add_qkv_bias"])
    yield from _linear("linear_proj", hidden, heads * size, bias=biases)
    if shape["qk_layernorm"]:
        yield "q_layernorm.weight", (size,)
        yield "k_layernorm.weight", (size,)
    if shape.get("softmax_type") == "learnable":
        yield "core_attention.softmax_offset", (heads,)
    if spec.post_norms:
        yield "post_layernorm.weight", (hidden,)


def _latent_attention(shape: Mapping[str, Any]) -> Named:
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    query, keys_values, rotated = shape["q_lora_rank"], shape["kv_lora_rank"], shape["qk_pos_emb_head_dim"]
    rows = heads * (shape["qk_head_dim"] + rotated)
    if query is None:
        yield "linear_q_proj.weight", (rows, hidden)
    else:
        yield "linear_q_down_proj.weight", (query, hidden)
        yield "linear_q_up_proj.weight", (rows, query)
        yield "q_layernorm.weight", (query,)
    yield "linear_kv_down_proj.weight", (keys_values + rotated, hidden)
    yield "linear_kv_up_proj.weight", (heads * (shape["qk_head_dim"] + shape["v_head_dim"]), keys_values)
    yield "kv_layernorm.weight", (keys_values,)
    yield "linear_proj.weight", (hidden, heads * shape["v_head_dim"])


def _dense_mlp(spec: MegatronSpec) -> Named:
    yield from _mlp(spec.transformer, spec.transformer["ffn_hidden_size"])
    if spec.post_norms:
        yield "post_layernorm.weight", (spec.transformer["hidden_size"],)


def _experts(shape: Mapping[str, Any]) -> Named:
    hidden, count = shape["hidden_size"], shape["num_moe_experts"]
    yield from _linear("router", count, hidden, bias=shape["add_bias_linear"])
    if shape.get("moe_router_enable_expert_bias"):
        yield "router.expert_bias", (count,)
    for number in range(count):
        yield from _under(f"experts.local_experts.{number}.", _mlp(shape, shape["moe_ffn_hidden_size"]))
    shared = shape.get("moe_shared_expert_intermediate_size")
    if shared:
        yield from _under("shared_experts.", _mlp(shape, shared))
    if shape.get("moe_shared_expert_gate"):
        yield "shared_experts.gate_weight", (1, hidden)


def _mlp(shape: Mapping[str, Any], size: int) -> Named:
    """Every family's is gated, so that the first linear has twice the rows."""
    hidden, bias = shape["hidden_size"], shape["add_bias_linear"]
    yield from _linear("linear_fc1", 2 * size, hidden, bias=bias)
    yield from _linear("linear_fc2", hidden, size, bias=bias)


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Named:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)
