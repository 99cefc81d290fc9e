"""Mixtral: Llama's attention, experts in every layer."""

from collections.abc import Mapping
from typing import Any

from bridge.families.decoder import DECODER, MODEL_RULES, attention_rules, decoder_spec, norm_rules, window
from bridge.families.moe import expert_rules, experts, router_rules, softmax_router
from bridge.layouts import Replicated
from bridge.rules import Family, MegatronSpec


def _mixtral(hf: Mapping[str, Any]) -> MegatronSpec:
    top_k = hf["num_experts_per_tok"]
    layers = [True] * hf["num_hidden_layers"]
    return decoder_spec(
        hf,
        **window(hf),
        **experts(hf["num_local_experts"], hf["intermediate_size"], top_k=top_k, moe_layers=layers),
        **softmax_router(top_k=top_k, normalized=True),
    )


MIXTRAL = Family(
    model_types=("mixtral",),
    rules=(
        *MODEL_RULES,
        *norm_rules(DECODER),
        *attention_rules(DECODER),
        DECODER.rule("mlp.router.weight", Replicated(), "block_sparse_moe.gate.weight"),
        *router_rules(DECODER),
        *expert_rules(DECODER, "block_sparse_moe.experts.{E}.", ("w1", "w3", "w2")),
    ),
    megatron=_mixtral,
)
