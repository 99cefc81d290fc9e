"""Qwen2 (biases on q, k and v) and Qwen3 (norms on q and k, head size of its own)."""

from collections.abc import Mapping
from typing import Any

from bridge.families.decoder import DENSE_RULES, decoder_spec, refuse
from bridge.rules import Family, MegatronSpec


def _qwen2(hf: Mapping[str, Any]) -> MegatronSpec:
    refuse(hf, "use_sliding_window", (False, None), False)
    return decoder_spec(hf, add_qkv_bias=True)


def _qwen3(hf: Mapping[str, Any]) -> MegatronSpec:
    refuse(hf, "use_sliding_window", (False, None), False)
    refuse(hf, "attention_bias", (False,), False)
    return decoder_spec({"head_dim": 128, **hf}, qk_layernorm=True)


QWEN2 = Family(model_types=("qwen2",), rules=DENSE_RULES, megatron=_qwen2)
QWEN3 = Family(model_types=("qwen3",), rules=DENSE_RULES, megatron=_qwen3)
