"""Qwen2-MoE (a gated shared expert) and Qwen3-MoE: Qwen's attention, some or all layers with experts."""

from collections.abc import Iterator, Mapping
from typing import Any

from bridge.families.decoder import DECODER, DENSE_RULES, decoder_spec, refuse
from bridge.families.moe import expert_rules, experts, router_rules, shared_expert_rules, softmax_router
from bridge.layouts import Replicated
from bridge.rules import Family, MegatronSpec

_MOE_RULES = (*DENSE_RULES, *router_rules(DECODER), *expert_rules(DECODER))


def _moe_layers(hf: Mapping[str, Any]) -> Iterator[bool]:
    dense, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
    for layer in range(hf["num_hidden_layers"]):
        yield layer not in dense and (layer + 1) % step == 0


def _spec(hf: Mapping[str, Any], count: int, **transformer: Any) -> MegatronSpec:
    refuse(hf, "use_sliding_window", (False, None), False)
    top_k = hf["num_experts_per_tok"]
    return decoder_spec(
        hf,
        **experts(count, hf["moe_intermediate_size"], top_k=top_k, moe_layers=_moe_layers(hf)),
        **softmax_router(top_k=top_k, normalized=hf.get("norm_topk_prob", False)),
        **transformer,
    )


def _qwen2_moe(hf: Mapping[str, Any]) -> MegatronSpec:
    return _spec(
        hf,
        hf["num_experts"],
        add_qkv_bias=hf.get("qkv_bias", True),
        moe_shared_expert_intermediate_size=hf["shared_expert_intermediate_size"],
        moe_shared_expert_gate=True,
    )


def _qwen3_moe(hf: Mapping[str, Any]) -> MegatronSpec:
    refuse(hf, "attention_bias", (False,), False)
    # transformers writes the key under its other name.
    count = hf["num_local_experts"] if "num_local_experts" in hf else hf["num_experts"]
    return _spec(hf, count, qk_layernorm=True)


QWEN2_MOE = Family(
    model_types=("qwen2_moe",),
    rules=(
        *_MOE_RULES,
        *shared_expert_rules(DECODER, "mlp.shared_expert."),
        DECODER.rule("mlp.shared_experts.gate_weight", Replicated(), "mlp.shared_expert_gate.weight"),
    ),
    megatron=_qwen2_moe,
)
QWEN3_MOE = Family(model_types=("qwen3_moe",), rules=_MOE_RULES, megatron=_qwen3_moe)
