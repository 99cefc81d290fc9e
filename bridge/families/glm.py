"""GLM-4 (norms also after attention and MLP) and GLM-4-MoE (DeepSeek-V3's experts, plain attention)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bridge.families.decoder import (
    DECODER,
    MODEL_RULES,
    Block,
    attention_rules,
    decoder_spec,
    norm_rules,
    refuse,
)
from bridge.families.moe import (
    MTP,
    MTP_COPIES,
    MTP_RULES,
    mixed_experts,
    mixed_mlp_rules,
    mtp_layers,
    sigmoid_router,
)
from bridge.families.rope import rope_parameters
from bridge.layouts import GateUp, Replicated, Row
from bridge.rules import Family, MegatronSpec, Rule


def _partial_rope(hf: Mapping[str, Any]) -> float:
    """The part of each head that is rotated."""
    rope = rope_parameters(hf)
    refuse(rope, "rope_type", ("default",), "default")
    return rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 0.5


def _glm4(hf: Mapping[str, Any]) -> MegatronSpec:
    spec = decoder_spec(hf, add_qkv_bias=hf.get("attention_bias", True), rotary_interleaved=True)
    return replace(spec, rotary_percent=_partial_rope(hf), post_norms=True)


def _glm4_moe(hf: Mapping[str, Any]) -> MegatronSpec:
    spec = decoder_spec(
        hf,
        add_qkv_bias=hf.get("attention_bias", False),
        qk_layernorm=hf.get("use_qk_norm", False),
        **mixed_experts(hf),
        **sigmoid_router(hf),
    )
    return replace(spec, rotary_percent=_partial_rope(hf), mtp_layers=mtp_layers(hf))


def _moe_layer_rules(block: Block) -> tuple[Rule, ...]:
    return (*norm_rules(block), *attention_rules(block), *mixed_mlp_rules(block))


GLM4 = Family(
    model_types=("glm4",),
    rules=(
        *MODEL_RULES,
        *norm_rules(DECODER),
        *attention_rules(DECODER),
        DECODER.rule("mlp.linear_fc1.weight", GateUp(fused=True), "mlp.gate_up_proj.weight"),
        DECODER.rule("mlp.linear_fc2.weight", Row(), "mlp.down_proj.weight"),
        DECODER.rule("self_attention.post_layernorm.weight", Replicated(), "post_self_attn_layernorm.weight"),
        DECODER.rule("mlp.post_layernorm.weight", Replicated(), "post_mlp_layernorm.weight"),
    ),
    megatron=_glm4,
)
GLM4_MOE = Family(
    model_types=("glm4_moe",),
    rules=(*MODEL_RULES, *_moe_layer_rules(DECODER), *MTP_RULES, *_moe_layer_rules(MTP)),
    megatron=_glm4_moe,
    copies=MTP_COPIES,
)
