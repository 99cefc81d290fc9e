"""InternVL as transformers has it (`internvl`): tiles of an image for a decoder of Qwen2 or Qwen3.

On disk there are two generations of names: `language_model.model.layers` with `vision_tower` at the top, and
`model.language_model.layers` with `model.vision_tower`, which is what transformers' modules are called.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bridge.families.decoder import DENSE_RULES, newer_name, refuse
from bridge.families.qwen import QWEN2, QWEN3
from bridge.rules import Family, HfModule, MegatronSpec, VisionSpec
from configs.errors import ConfigError

_LANGUAGE = {"qwen2": QWEN2, "qwen3": QWEN3}


def _internvl(hf: Mapping[str, Any]) -> MegatronSpec:
    refuse(hf, "vision_feature_layer", (-1,), -1)
    refuse(hf, "vision_feature_select_strategy", ("default",), "default")
    vision, text = hf["vision_config"], hf["text_config"]
    if text["model_type"] not in _LANGUAGE:
        raise ConfigError(
            f"text_config: model_type is {text['model_type']!r}; supported here: {' or '.join(_LANGUAGE)}"
        )
    rope = text.get("rope_parameters") or {}
    if rope.get("rope_type") == "dynamic":
        # It differs from the default only beyond max_position_embeddings.
        text = {**text, "rope_parameters": {**rope, "rope_type": "default"}}
    # That of the whole is true where the file does not say; with the other it was always meant.
    tied = hf["tie_word_embeddings"] and text.get("tie_word_embeddings", False)
    spec = _LANGUAGE[text["model_type"]].megatron({**text, "tie_word_embeddings": tied})
    merge = round(1 / hf["downsample_ratio"])
    height, width = vision["image_size"]
    rows, columns = (side // patch for side, patch in zip((height, width), vision["patch_size"], strict=True))
    if merge * hf["downsample_ratio"] != 1 or rows != columns or rows % merge:
        raise ConfigError(
            f"vision_config: tiles of {rows} x {columns} patches with downsample_ratio {hf['downsample_ratio']}; "
            "they have to be square, and their sides a multiple of its reciprocal"
        )
    return replace(
        spec,
        vision=VisionSpec(
            tower="bridge.internvl_tower.InternVLTower",
            config=hf,
            image_token_id=hf["image_token_id"],
            video_token_id=hf["image_token_id"],
            spatial_merge_size=merge,
            aligner=("multi_modal_projector.",),
            hf_modules=("vision_tower", "multi_modal_projector"),
            tile=(height, width),
        ),
    )


_RULES = tuple(
    replace(rule, hf=tuple(map(rename, rule.hf)))
    for rename in (newer_name, lambda name: f"language_model.{name}")
    for rule in DENSE_RULES
)

INTERNVL = Family(
    model_types=("internvl",),
    rules=_RULES,
    megatron=_internvl,
    modules=(HfModule("visual.", ("model.", "")),),
)
