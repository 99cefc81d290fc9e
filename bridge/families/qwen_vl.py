"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense and MoE): Qwen's decoders with three positions for each token.

The vision tower is transformers' own. On disk there are two generations of names: `model.layers` with `visual`,
and `model.language_model.layers` with `model.visual`, which is what transformers' modules are called.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bridge.families.decoder import DECODER, DENSE_RULES, newer_name, refuse
from bridge.families.moe import packed_expert_rules, router_rules
from bridge.families.qwen import QWEN2, QWEN3
from bridge.families.qwen_moe import QWEN3_MOE
from bridge.rules import Family, HfModule, MegatronSpec, Rule, VisionSpec
from configs.errors import ConfigError

_MODELS = "transformers.models"
_TOWER = HfModule("visual.", ("model.visual.", "visual."))
_MOE_RULES = (*DENSE_RULES, *router_rules(DECODER), *packed_expert_rules(DECODER))


def _in_both_generations(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    newer = [replace(rule, hf=tuple(map(newer_name, rule.hf))) for rule in rules]
    return tuple(dict.fromkeys([*newer, *rules]))


def _spec(
    hf: Mapping[str, Any], language: Callable[[Mapping[str, Any]], MegatronSpec], **vision: Any
) -> MegatronSpec:
    text, tower = hf["text_config"], hf["vision_config"]
    spec = language({**text, "tie_word_embeddings": hf.get("tie_word_embeddings", False)})
    rope = text.get("rope_parameters") or {}
    if spec.yarn is not None or spec.rope_scaling_factor is not None:
        raise ConfigError(f"rotary embedding {rope} is not supported with three positions for each token")
    section = rope.get("mrope_section")
    if section is None or len(section) != 3 or sum(section) != spec.head_dim // 2:
        raise ConfigError(
            f"mrope_section {section} of the rotary embedding has to be three sizes with the sum "
            f"{spec.head_dim // 2}, half of a head"
        )
    return replace(
        spec,
        vision=VisionSpec(
            config=tower,
            image_token_id=hf["image_token_id"],
            video_token_id=hf["video_token_id"],
            spatial_merge_size=tower["spatial_merge_size"],
            mrope_section=tuple(section),
            marks=(hf["vision_start_token_id"], hf["vision_end_token_id"]),
            **vision,
        ),
    )


def _qwen2_vl(hf: Mapping[str, Any]) -> MegatronSpec:
    return _spec(
        hf,
        QWEN2.megatron,
        tower=f"{_MODELS}.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        aligner=("merger.",),
        mrope_interleaved=False,
    )


def _qwen2_5_vl(hf: Mapping[str, Any]) -> MegatronSpec:
    return _spec(
        hf,
        QWEN2.megatron,
        tower=f"{_MODELS}.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        aligner=("merger.",),
        mrope_interleaved=False,
        tokens_per_second=hf["vision_config"]["tokens_per_second"],
    )


def _qwen3_vl(hf: Mapping[str, Any]) -> MegatronSpec:
    tower = f"{_MODELS}.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel"
    return _spec(hf, QWEN3.megatron, tower=tower, **_qwen3_vision(hf))


def _qwen3_vl_moe(hf: Mapping[str, Any]) -> MegatronSpec:
    # Its router has no option: the chosen experts' weights always add up to one.
    refuse(hf["text_config"], "norm_topk_prob", (True,), True)
    text = {**hf["text_config"], "norm_topk_prob": True}
    hidden, width = text["hidden_size"], text["moe_intermediate_size"]
    if hidden in (width, 2 * width):
        raise ConfigError(
            f"hidden_size {hidden} with moe_intermediate_size {width}: packed experts are then square, and "
            "whether a checkpoint has them transposed cannot be told"
        )
    tower = f"{_MODELS}.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel"
    return _spec({**hf, "text_config": text}, QWEN3_MOE.megatron, tower=tower, **_qwen3_vision(hf))


def _qwen3_vision(hf: Mapping[str, Any]) -> dict[str, Any]:
    layers = hf["vision_config"]["deepstack_visual_indexes"]
    return {
        "aligner": ("merger.", "deepstack_merger_list."),
        "mrope_interleaved": True,
        "deepstack": len(layers),
        "timestamps": True,
    }


QWEN2_VL = Family(
    model_types=("qwen2_vl",),
    rules=_in_both_generations(DENSE_RULES),
    megatron=_qwen2_vl,
    modules=(_TOWER,),
)
QWEN2_5_VL = replace(QWEN2_VL, model_types=("qwen2_5_vl",), megatron=_qwen2_5_vl)
QWEN3_VL = replace(QWEN2_VL, model_types=("qwen3_vl",), megatron=_qwen3_vl)
QWEN3_VL_MOE = Family(
    model_types=("qwen3_vl_moe",),
    rules=_in_both_generations(_MOE_RULES),
    megatron=_qwen3_vl_moe,
    modules=(_TOWER,),
)
