"""What the decoders have in common: the rules of Llama's block, and the translation of its config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridge.families.rope import rope_fields
from bridge.layouts import QKV, GateUp, Layout, Replicated, Row, Vocabulary
from bridge.rules import MegatronSpec, Rule
from configs.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Block:
    """Where a layer's parameters live on both sides; it makes rules whose names lack these prefixes."""

    mcore: str
    hf: str

    def rule(self, mcore: str, layout: Layout, *hf: str) -> Rule:
        """The rule for one parameter of the layer."""
        return Rule(self.mcore + mcore, tuple(self.hf + name for name in hf), layout)

    def linear(self, mcore: str, layout: Layout, *hf: str) -> tuple[Rule, Rule]:
        """Weight and bias of a linear layer; a row-parallel one has its bias whole on every rank."""
        bias = Replicated() if isinstance(layout, Row) else layout
        return (
            self.rule(f"{mcore}.weight", layout, *(f"{name}.weight" for name in hf)),
            self.rule(f"{mcore}.bias", bias, *(f"{name}.bias" for name in hf)),
        )


DECODER = Block("decoder.layers.{L}.", "model.layers.{L}.")

MODEL_RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
    Rule("output_layer.weight", ("lm_head.weight",), Vocabulary()),
)
"""Everything outside the layers."""


def norm_rules(block: Block) -> tuple[Rule, ...]:
    """The two norms before attention and MLP."""
    return (
        block.rule("input_layernorm.weight", Replicated(), "input_layernorm.weight"),
        block.rule("pre_mlp_layernorm.weight", Replicated(), "post_attention_layernorm.weight"),
    )


def attention_rules(block: Block) -> tuple[Rule, ...]:
    """Attention with query groups, with biases and with norms on queries and keys."""
    inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return (
        *block.linear("self_attention.linear_qkv", QKV(), *inputs),
        block.rule("self_attention.q_layernorm.weight", Replicated(), "self_attn.q_norm.weight"),
        block.rule("self_attention.k_layernorm.weight", Replicated(), "self_attn.k_norm.weight"),
        *block.linear("self_attention.linear_proj", Row(), "self_attn.o_proj"),
    )


def mlp_rules(block: Block) -> tuple[Rule, ...]:
    """A gated MLP."""
    return (
        *block.linear("mlp.linear_fc1", GateUp(), "mlp.gate_proj", "mlp.up_proj"),
        *block.linear("mlp.linear_fc2", Row(), "mlp.down_proj"),
    )


def newer_name(name: str) -> str:
    """What transformers' modules of a model that sees are called; the head is outside of its language model."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


DENSE_RULES = (*MODEL_RULES, *norm_rules(DECODER), *attention_rules(DECODER), *mlp_rules(DECODER))


def decoder_spec(
    hf: Mapping[str, Any], *, rope: Mapping[str, Any] | None = None, **transformer: Any
) -> MegatronSpec:
    """Translate the config of a decoder like Llama; `transformer` adds what the family has besides.

    `rope` are the fields of MegatronSpec for the rotary embedding, if not those for attention with query groups.
    Raises ConfigError naming what Megatron cannot do as transformers does.
    """
    refuse(hf, "hidden_act", ("silu",), "silu")
    heads = hf["num_attention_heads"]
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
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        **(rope_fields(hf) if rope is None else rope),
    )


def window(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's options for a sliding window in every layer, if the model has one."""
    tokens = hf.get("sliding_window")
    return {} if tokens is None else {"window_size": (tokens - 1, 0)}


def refuse(hf: Mapping[str, Any], key: str, supported: tuple[Any, ...], default: Any) -> None:
    """Raises ConfigError unless the value of `key` in config.json is one that is supported."""
    value = hf.get(key, default)
    if value not in supported:
        wanted = " or ".join(repr(choice) for choice in supported)
        raise ConfigError(f"{key} is {value!r}; supported here: {wanted}")
