"""DeepSeek-V2 and DeepSeek-V3: latent attention, shared experts; V3 with multi-token prediction."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bridge.families.decoder import DECODER, MODEL_RULES, Block, decoder_spec, norm_rules, refuse
from bridge.families.moe import (
    MTP,
    MTP_COPIES,
    MTP_RULES,
    expert_groups,
    mixed_experts,
    mixed_mlp_rules,
    mtp_layers,
    sigmoid_router,
    softmax_router,
)
from bridge.families.rope import latent_rope_fields
from bridge.layouts import Column, Replicated, Row
from bridge.rules import Family, MegatronSpec, Rule


def _attention_rules(block: Block) -> tuple[Rule, ...]:
    """Latent attention; queries either straight from the hidden states or through a latent of their own."""
    attention = Block(block.mcore + "self_attention.", block.hf + "self_attn.")
    return (
        attention.rule("linear_q_proj.weight", Column(), "q_proj.weight"),
        attention.rule("linear_q_down_proj.weight", Column(), "q_a_proj.weight"),
        attention.rule("q_layernorm.weight", Replicated(), "q_a_layernorm.weight"),
        attention.rule("linear_q_up_proj.weight", Column(), "q_b_proj.weight"),
        attention.rule("linear_kv_down_proj.weight", Column(), "kv_a_proj_with_mqa.weight"),
        attention.rule("kv_layernorm.weight", Replicated(), "kv_a_layernorm.weight"),
        attention.rule("linear_kv_up_proj.weight", Column(), "kv_b_proj.weight"),
        attention.rule("linear_proj.weight", Row(), "o_proj.weight"),
    )


def _layer_rules(block: Block) -> tuple[Rule, ...]:
    return (*norm_rules(block), *_attention_rules(block), *mixed_mlp_rules(block))


def _spec(hf: Mapping[str, Any], **router: Any) -> MegatronSpec:
    """What both have; `router` are the arguments of the one that the version has."""
    refuse(hf, "moe_layer_freq", (1,), 1)
    refuse(hf, "attention_bias", (False,), False)
    # transformers leaves the norms of the latents at this value whatever the config says.
    refuse(hf, "rms_norm_eps", (1e-6,), 1e-6)
    rope = latent_rope_fields(hf)
    return decoder_spec(
        hf,
        rope={"rotary_base": rope["rotary_base"]},
        multi_latent_attention=True,
        qk_layernorm=True,
        num_query_groups=hf["num_attention_heads"],
        kv_channels=hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"],
        q_lora_rank=hf["q_lora_rank"],
        kv_lora_rank=hf["kv_lora_rank"],
        qk_head_dim=hf["qk_nope_head_dim"],
        qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        **rope,
        **mixed_experts(hf),
        **router,
    )


def _deepseek_v2(hf: Mapping[str, Any]) -> MegatronSpec:
    refuse(hf, "mlp_bias", (False,), False)
    refuse(hf, "scoring_func", ("softmax",), "softmax")
    refuse(hf, "norm_topk_prob", (False,), False)
    refuse(hf, "topk_method", ("greedy", "group_limited_greedy"), "greedy")
    limited = hf.get("topk_method") == "group_limited_greedy"
    return _spec(
        hf,
        **softmax_router(top_k=hf["num_experts_per_tok"], normalized=False),
        moe_router_topk_scaling_factor=hf.get("routed_scaling_factor", 1.0),
        **(expert_groups(hf, scored_by=1) if limited else {}),
    )


def _deepseek_v3(hf: Mapping[str, Any]) -> MegatronSpec:
    refuse(hf, "rope_interleave", (True,), True)
    refuse(hf, "scoring_func", ("sigmoid",), "sigmoid")
    refuse(hf, "topk_method", ("noaux_tc",), "noaux_tc")
    return replace(_spec(hf, **sigmoid_router(hf)), mtp_layers=mtp_layers(hf))


DEEPSEEK_V2 = Family(
    model_types=("deepseek_v2",), rules=(*MODEL_RULES, *_layer_rules(DECODER)), megatron=_deepseek_v2
)
DEEPSEEK_V3 = Family(
    model_types=("deepseek_v3",),
    rules=(*MODEL_RULES, *_layer_rules(DECODER), *MTP_RULES, *_layer_rules(MTP)),
    megatron=_deepseek_v3,
    copies=MTP_COPIES,
)
