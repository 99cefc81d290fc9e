"""Llama and the many models that say they are one (SmolLM2 among them), and Mistral."""

from collections.abc import Mapping
from typing import Any

from bridge.families.decoder import DENSE_RULES, decoder_spec, window
from bridge.rules import Family, MegatronSpec
from configs.errors import ConfigError


def _llama(hf: Mapping[str, Any]) -> MegatronSpec:
    attention, mlp = hf.get("attention_bias", False), hf.get("mlp_bias", False)
    if attention != mlp:
        # Megatron has one switch for the biases of linear_proj, linear_fc1 and linear_fc2.
        raise ConfigError(f"attention_bias {attention} with mlp_bias {mlp} is not supported; they must agree")
    return decoder_spec(hf, add_bias_linear=attention, add_qkv_bias=attention)


def _mistral(hf: Mapping[str, Any]) -> MegatronSpec:
    return decoder_spec(hf, **window(hf))


LLAMA = Family(model_types=("llama",), rules=DENSE_RULES, megatron=_llama)
MISTRAL = Family(model_types=("mistral",), rules=DENSE_RULES, megatron=_mistral)
