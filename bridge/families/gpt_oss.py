"""gpt-oss: attention sinks, sliding windows in some layers, packed experts with biases."""

from collections.abc import Mapping
from typing import Any

from bridge.families.decoder import DECODER, MODEL_RULES, attention_rules, decoder_spec, norm_rules, refuse
from bridge.families.moe import experts, softmax_router
from bridge.layouts import Column, Packed, PackedInterleavedGateUp, Replicated, Row
from bridge.rules import Family, MegatronSpec

_EXPERT = "mlp.experts.local_experts.{E}."


def _gpt_oss(hf: Mapping[str, Any]) -> MegatronSpec:
    refuse(hf, "attention_bias", (True,), True)
    # The slope of Megatron's quick_gelu.
    refuse(hf, "swiglu_alpha", (1.702,), 1.702)
    layers, top_k = hf["num_hidden_layers"], hf["num_experts_per_tok"]
    return decoder_spec(
        hf,
        add_bias_linear=True,
        add_qkv_bias=True,
        activation="quick_gelu",
        glu_linear_offset=1.0,
        activation_func_clamp_value=float(hf.get("swiglu_limit", 7.0)),
        softmax_type="learnable",
        # Megatron does not count the token itself.
        window_size=(hf["sliding_window"] - 1, 0),
        window_attn_skip_freq=[int(kind == "sliding_attention") for kind in hf["layer_types"]],
        **experts(hf["num_local_experts"], hf["intermediate_size"], top_k=top_k, moe_layers=[True] * layers),
        **softmax_router(top_k=top_k, normalized=True),
    )


GPT_OSS = Family(
    model_types=("gpt_oss",),
    rules=(
        *MODEL_RULES,
        *norm_rules(DECODER),
        *attention_rules(DECODER),
        DECODER.rule("self_attention.core_attention.softmax_offset", Column(), "self_attn.sinks"),
        *DECODER.linear("mlp.router", Replicated(), "mlp.router"),
        DECODER.rule(_EXPERT + "linear_fc1.weight", PackedInterleavedGateUp(), "mlp.experts.gate_up_proj"),
        DECODER.rule(_EXPERT + "linear_fc1.bias", PackedInterleavedGateUp(), "mlp.experts.gate_up_proj_bias"),
        DECODER.rule(_EXPERT + "linear_fc2.weight", Packed(Row(), transposed=True), "mlp.experts.down_proj"),
        DECODER.rule(_EXPERT + "linear_fc2.bias", Packed(Replicated()), "mlp.experts.down_proj_bias"),
    ),
    megatron=_gpt_oss,
)
