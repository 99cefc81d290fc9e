"""Rotary position embeddings: from either generation of config.json to Megatron's terms."""

from collections.abc import Mapping
from typing import Any

from configs.errors import ConfigError


def rope_parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The embedding's parameters, `rope_type` and `rope_theta` always among them."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope["rope_theta"] = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of MegatronSpec for attention with query groups. Raises ConfigError for other kinds."""
    rope = rope_parameters(hf)
    kind, fields = rope["rope_type"], {"rotary_base": rope["rope_theta"]}
    # Megatron's llama3 scaling has these three numbers built in.
    fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "default":
        return fields
    if kind == "llama3" and all(rope.get(key) == value for key, value in fixed.items()):
        return {**fields, "rope_scaling_factor": float(rope["factor"])}
    if kind == "yarn":
        scaled = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
        yarn = {
            **_yarn(rope),
            "mscale": float(rope["mscale"]) if scaled else None,
            "mscale_all_dim": float(rope["mscale_all_dim"]) if scaled else None,
            "correction_range_round_to_int": rope.get("truncate", True),
        }
        return {**fields, "yarn": yarn}
    raise ConfigError(f"rotary embedding {rope} is not supported; default, yarn and llama3 ({fixed}) are")


def latent_rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of MLATransformerConfig. Raises ConfigError for kinds that it does not have."""
    rope = rope_parameters(hf)
    if rope["rope_type"] == "default":
        return {"rope_type": "rope", "rotary_base": rope["rope_theta"]}
    if rope["rope_type"] != "yarn" or not rope.get("truncate", True):
        raise ConfigError(f"rotary embedding {rope} is not supported; default and yarn (truncate) are")
    everywhere = rope.get("mscale_all_dim")
    if everywhere and not rope.get("mscale"):
        raise ConfigError("a rotary embedding with mscale_all_dim needs mscale as well")
    # Without both, transformers scales by the factor alone; in Megatron's formula that is (1, 0).
    mscale, everywhere = (float(rope["mscale"]), float(everywhere)) if everywhere else (1.0, 0.0)
    return {
        "rope_type": "yarn",
        "rotary_base": rope["rope_theta"],
        **_yarn(rope),
        "mscale": mscale,
        "mscale_all_dim": everywhere,
    }


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What YaRN has in both kinds of attention, with transformers' defaults."""
    if rope.get("attention_factor") is not None:
        raise ConfigError(
            f"attention_factor {rope['attention_factor']} of the rotary embedding is not "
            "supported; Megatron derives it from factor, mscale and mscale_all_dim"
        )
    return {
        "rotary_scaling_factor": float(rope["factor"]),
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
    }
