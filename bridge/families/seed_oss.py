"""Seed-OSS: Llama with biases on q, k and v."""

from collections.abc import Mapping
from typing import Any

from bridge.families.decoder import DENSE_RULES, decoder_spec, refuse
from bridge.rules import Family, MegatronSpec


def _seed_oss(hf: Mapping[str, Any]) -> MegatronSpec:
    refuse(hf, "attention_out_bias", (False,), False)
    refuse(hf, "mlp_bias", (False,), False)
    return decoder_spec(hf, add_qkv_bias=hf["attention_bias"])


SEED_OSS = Family(model_types=("seed_oss",), rules=DENSE_RULES, megatron=_seed_oss)
