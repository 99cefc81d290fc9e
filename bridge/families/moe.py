"""What the mixtures of experts have in common: the rules of routed and shared experts, and their config."""

from collections.abc import Iterable, Mapping
from typing import Any

from bridge.families.decoder import Block, mlp_rules
from bridge.layouts import Column, GateUp, Packed, Replicated, Row
from bridge.rules import Copy, Rule
from configs.errors import ConfigError

_FC1 = "mlp.experts.local_experts.{E}.linear_fc1.weight"
_FC2 = "mlp.experts.local_experts.{E}.linear_fc2.weight"


def expert_rules(
    block: Block,
    hf: str = "mlp.experts.{E}.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Rule, ...]:
    """Routed experts with tensors of their own, as on disk; or else packed, as transformers holds them."""
    gate, up, down = (f"{hf}{name}.weight" for name in names)
    return (
        block.rule(_FC1, GateUp(), gate, up),
        block.rule(_FC2, Row(), down),
        block.rule(_FC1, Packed(GateUp(fused=True)), "mlp.experts.gate_up_proj"),
        block.rule(_FC2, Packed(Row()), "mlp.experts.down_proj"),
    )


def packed_expert_rules(block: Block) -> tuple[Rule, ...]:
    """Routed experts that are packed on disk: input features before output features, or the other way round."""
    return tuple(
        block.rule(mcore, Packed(layout, transposed=transposed), hf)
        for transposed in (True, False)
        for mcore, layout, hf in (
            (_FC1, GateUp(fused=True), "mlp.experts.gate_up_proj"),
            (_FC2, Row(), "mlp.experts.down_proj"),
        )
    )


def router_rules(block: Block) -> tuple[Rule, ...]:
    """The router, with the bias that steers only the choice of experts (DeepSeek-V3)."""
    return (
        block.rule("mlp.router.weight", Replicated(), "mlp.gate.weight"),
        block.rule("mlp.router.expert_bias", Replicated(), "mlp.gate.e_score_correction_bias"),
    )


def shared_expert_rules(block: Block, hf: str = "mlp.shared_experts.") -> tuple[Rule, ...]:
    """The experts that every token goes to, which are one MLP."""
    return (
        block.rule(
            "mlp.shared_experts.linear_fc1.weight", GateUp(), f"{hf}gate_proj.weight", f"{hf}up_proj.weight"
        ),
        block.rule("mlp.shared_experts.linear_fc2.weight", Row(), f"{hf}down_proj.weight"),
    )


def mixed_mlp_rules(block: Block) -> tuple[Rule, ...]:
    """An MLP, or routed and shared experts: DeepSeek's layers, of which the first ones are dense."""
    return (
        *mlp_rules(block),
        *router_rules(block),
        *expert_rules(block),
        *shared_expert_rules(block),
    )


MTP = Block("mtp.layers.{M}.transformer_layer.", "model.layers.{N}.")
"""The decoder layer inside a multi-token-prediction layer; on disk it follows the decoder's layers."""

_MTP_OUTER = Block("mtp.layers.{M}.", MTP.hf)
MTP_RULES = (
    _MTP_OUTER.rule("enorm.weight", Replicated(), "enorm.weight"),
    _MTP_OUTER.rule("hnorm.weight", Replicated(), "hnorm.weight"),
    _MTP_OUTER.rule("eh_proj.weight", Column(), "eh_proj.weight"),
    _MTP_OUTER.rule("final_layernorm.weight", Replicated(), "shared_head.norm.weight"),
)
"""What a multi-token-prediction layer has around its decoder layer."""

MTP_COPIES = (
    Copy(MTP.hf + "embed_tokens.weight", "model.embed_tokens.weight"),
    Copy(MTP.hf + "shared_head.head.weight", "lm_head.weight"),
)


def mtp_layers(hf: Mapping[str, Any]) -> int:
    """Multi-token-prediction layers by the config; transformers fills in 1 where the key is missing."""
    return hf.get("num_nextn_predict_layers") or 0


def experts(count: int, size: int, *, top_k: int, moe_layers: Iterable[bool]) -> dict[str, Any]:
    """TransformerConfig's arguments for `count` experts of feed-forward size `size`."""
    if not 1 <= top_k <= count:
        raise ConfigError(f"num_experts_per_tok is {top_k}, the model has {count} experts")
    return {
        "num_moe_experts": count,
        "moe_ffn_hidden_size": size,
        "moe_router_topk": top_k,
        "moe_layer_freq": [int(is_moe) for is_moe in moe_layers],
    }


def mixed_experts(hf: Mapping[str, Any]) -> dict[str, Any]:
    """TransformerConfig's arguments for DeepSeek's routed and shared experts after the first dense layers."""
    size, first = hf["moe_intermediate_size"], hf["first_k_dense_replace"]
    return {
        **experts(
            hf["n_routed_experts"],
            size,
            top_k=hf["num_experts_per_tok"],
            moe_layers=[layer >= first for layer in range(hf["num_hidden_layers"])],
        ),
        "moe_shared_expert_intermediate_size": hf["n_shared_experts"] * size,
    }


def softmax_router(*, top_k: int, normalized: bool) -> dict[str, Any]:
    """A softmax over all experts, of which `top_k` count, `normalized` to a sum of one or not.

    To normalize is to take the softmax over the chosen ones. Raises ConfigError for one normalized expert,
    whose weight would always be one: Megatron refuses it.
    """
    if normalized and top_k == 1:
        raise ConfigError("norm_topk_prob with num_experts_per_tok 1 is not supported")
    return {"moe_router_score_function": "softmax", "moe_router_pre_softmax": not normalized}


def sigmoid_router(hf: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSeek-V3's router: sigmoid scores, chosen with a bias on top, within the best groups of experts.

    Raises ConfigError for normalizations and groups that Megatron computes otherwise.
    """
    top_k, normalized = hf["num_experts_per_tok"], hf.get("norm_topk_prob", True)
    if normalized != (top_k > 1):
        raise ConfigError(
            f"norm_topk_prob {normalized} with num_experts_per_tok {top_k} is not supported; "
            "Megatron normalizes exactly when there are several experts"
        )
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": hf.get("routed_scaling_factor", 1.0),
        **expert_groups(hf, scored_by=2),
    }


def expert_groups(hf: Mapping[str, Any], *, scored_by: int) -> dict[str, Any]:
    """Routing limited to the best groups of experts, where transformers adds up each group's `scored_by` best.

    Megatron adds up num_experts_per_tok // topk_group of them. Raises ConfigError where that is another number.
    """
    groups, chosen = hf.get("n_group") or 1, hf.get("topk_group") or 1
    top_k, count = hf["num_experts_per_tok"], hf["n_routed_experts"]
    if groups == chosen:
        return {}
    if count % groups or not 0 < chosen < groups or chosen * (count // groups) < top_k:
        raise ConfigError(
            f"{count} experts, n_group {groups}, topk_group {chosen} and num_experts_per_tok "
            f"{top_k} make no router"
        )
    if top_k // chosen != scored_by:
        raise ConfigError(
            f"num_experts_per_tok {top_k} with topk_group {chosen} is not supported: Megatron scores "
            f"a group by its {top_k // chosen} best experts, transformers by {scored_by}"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
