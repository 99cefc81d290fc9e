"""What the dense decoders have in common: the rules of Llama's block, and the translation of its config."""

from collections.abc import Mapping
from typing import Any

from bridge.layouts import QKV, GateUp, Replicated, Row, Vocabulary
from bridge.rules import MegatronSpec, Rule
from configs.errors import ConfigError

_MCORE = "decoder.layers.{L}."
_HF = "model.layers.{L}."

DENSE_RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    # Without Transformer Engine the norms are modules of their own; with it they are part of the next linear.
    Rule(_MCORE + "input_layernorm.weight", (_HF + "input_layernorm.weight",), Replicated()),
    Rule(
        _MCORE + "self_attention.linear_qkv.layer_norm_weight",
        (_HF + "input_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        _MCORE + "self_attention.linear_qkv.weight",
        tuple(f"{_HF}self_attn.{name}_proj.weight" for name in "qkv"),
        QKV(),
    ),
    Rule(
        _MCORE + "self_attention.linear_qkv.bias",
        tuple(f"{_HF}self_attn.{name}_proj.bias" for name in "qkv"),
        QKV(),
    ),
    Rule(_MCORE + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), Replicated()),
    Rule(_MCORE + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), Replicated()),
    Rule(_MCORE + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), Row()),
    Rule(_MCORE + "self_attention.linear_proj.bias", (_HF + "self_attn.o_proj.bias",), Replicated()),
    Rule(_MCORE + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), Replicated()),
    Rule(
        _MCORE + "mlp.linear_fc1.layer_norm_weight",
        (_HF + "post_attention_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        _MCORE + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        GateUp(),
    ),
    Rule(_MCORE + "mlp.linear_fc1.bias", (_HF + "mlp.gate_proj.bias", _HF + "mlp.up_proj.bias"), GateUp()),
    Rule(_MCORE + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), Row()),
    Rule(_MCORE + "mlp.linear_fc2.bias", (_HF + "mlp.down_proj.bias",), Replicated()),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
    Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
)
"""A rule whose parameter a model does not have is simply not used."""


def dense_spec(hf: Mapping[str, Any], **transformer: Any) -> MegatronSpec:
    """Translate the config of a dense decoder; `transformer` adds what the family has besides."""
    refuse(hf, "hidden_act", ("silu",), "silu")
    refuse(hf, "use_sliding_window", (False, None), False)
    heads = hf["num_attention_heads"]
    base, scaling = _rope(hf)
    return MegatronSpec(
        transformer={
            "num_layers": hf["num_hidden_layers"],
            "hidden_size": hf["hidden_size"],
            "num_attention_heads": heads,
            "num_query_groups": hf.get("num_key_value_heads") or heads,
            "kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
            "ffn_hidden_size": hf["intermediate_size"],
            "normalization": "RMSNorm",
            "layernorm_epsilon": hf.get("rms_norm_eps", 1e-6),
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "qk_layernorm": False,
            "gated_linear_unit": True,
            "activation": "silu",
            **transformer,
        },
        vocab_size=hf["vocab_size"],
        max_sequence_length=hf["max_position_embeddings"],
        rotary_base=base,
        rope_scaling_factor=scaling,
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
    )


def refuse(hf: Mapping[str, Any], key: str, supported: tuple[Any, ...], default: Any) -> None:
    """Raises ConfigError unless the value of `key` in config.json is one that is supported."""
    value = hf.get(key, default)
    if value not in supported:
        wanted = " or ".join(repr(choice) for choice in supported)
        raise ConfigError(f"config.json: {key} is {value!r}; supported here: {wanted}")


def _rope(hf: Mapping[str, Any]) -> tuple[float, float | None]:
    """Base of the rotary embedding and Llama 3's scaling factor, from either generation of config.json."""
    rope = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta")}
    base = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return base, None
    # Megatron's scaling has these three numbers built in.
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(rope.get(key) == value for key, value in fixed.items()):
        return base, float(rope["factor"])
    raise ConfigError(
        f"config.json: rotary embedding {rope} is not supported; default and llama3 ({fixed}) are"
    )
