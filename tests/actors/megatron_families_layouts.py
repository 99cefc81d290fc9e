"""Which families are tried under which layouts; read by the tests and by their workers."""

import math
from typing import Any

_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
_PP = {"pipeline_model_parallel_size": 2}
_DP = {"data_parallel_size": 2}
_CP = {"context_parallel_size": 2}


def _ep(size: int, tensor: int | None) -> dict[str, Any]:
    return {"expert_model_parallel_size": size, "expert_tensor_parallel_size": tensor}


def world_size(layout: str) -> int:
    """Processes that the layout takes."""
    sizes = LAYOUTS[layout]
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
    names += ("context_parallel_size",)
    return math.prod(sizes.get(name, 1) for name in names)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": _SP,
    "tp2-sp-etp1": _SP | _ep(1, 1),
    "tp2-sp-ep2": _SP | _ep(2, 1),
    "ep2": _DP | _ep(2, None),
    "ep2-split": _DP | _ep(2, None),
    "pp2": _PP,
    "pp2-first1": _PP | {"num_layers_in_first_pipeline_stage": 1},
    "pp2-vpp2": _PP | {"virtual_pipeline_model_parallel_size": 2},
    "pp2-vpp2-layout": _PP | {"pipeline_model_parallel_layout": "E|t*2|t,|t,L"},
    "pp2-vpp2-layout-mtp": _PP | {"pipeline_model_parallel_layout": "Et|t|t|t,m,L"},
    "cp2": _CP,
    "cp2-ep2": _CP | _ep(2, None),
    "tp2-ep2": {"tensor_model_parallel_size": 2} | _ep(2, 1),
    "tp4-sp": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    "tp2-pp2-ep2": {"tensor_model_parallel_size": 2} | _PP | _ep(2, 1),
    "tp2-sp-pp2-ep2": _SP | _PP | _ep(2, 1),
    "tp2-sp-dp2-ep2-etp2": _SP | _DP | _ep(2, 2),
    "tp2-sp-dp2-ep2-split": _SP | _DP | _ep(2, 1),
    "tp2-sp-pp2-vpp2": _SP | _PP | {"virtual_pipeline_model_parallel_size": 2},
    "pp2-dp2-ep2": _PP | _DP | _ep(2, None),
}

DENSE = (
    "llama",
    "llama-3-groups",
    "llama-biases",
    "mistral",
    "qwen2-tied",
    "qwen3",
    "qwen3-1-group",
    "glm4",
    "seed_oss",
)
MOE = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe-unnormalized",
    "deepseek_v2",
    "deepseek_v2-grouped",
    "deepseek_v3",
    "deepseek_v3-yarn",
    "glm4_moe",
    "gpt_oss",
    "gpt_oss-yarn",
)
SIGHTED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl")
UNDER_TP = ("llama-biases", "mistral", "qwen2-tied", "qwen3", "qwen3-1-group", "glm4", "seed_oss")
WITHOUT_BIASES = tuple(family for family in MOE if not family.startswith("gpt_oss"))

STEPS: dict[str, tuple[str, ...]] = {
    "one": DENSE + MOE + SIGHTED,
    "tp2": ("llama-biases", "qwen2-tied", "qwen3-1-group", "glm4", "qwen2_5_vl", "qwen3_vl"),
    "tp2-sp": UNDER_TP + WITHOUT_BIASES + SIGHTED,
    "tp2-sp-etp1": ("qwen2_moe", "deepseek_v3", "gpt_oss"),
    "tp2-sp-ep2": MOE,
    "ep2": ("qwen3_vl_moe", "mixtral", "qwen2_moe", "deepseek_v2-grouped", "deepseek_v3", "gpt_oss"),
    "ep2-split": ("qwen2_moe", "gpt_oss"),
    "pp2": (
        "qwen2_vl",
        "qwen3_vl",
        "llama-3-groups",
        "qwen2-tied",
        "glm4",
        "qwen2_moe",
        "deepseek_v3",
        "gpt_oss-yarn",
    ),
    "pp2-first1": ("qwen2-tied", "qwen3_moe"),
    "pp2-vpp2": (
        "qwen2_5_vl",
        "internvl",
        "llama-3-groups",
        "qwen2-tied",
        "qwen2_moe",
        "deepseek_v3-yarn",
        "gpt_oss",
    ),
    "pp2-vpp2-layout": ("qwen2-tied", "deepseek_v3"),
    "cp2": (
        "qwen2_5_vl",
        "qwen3_vl",
        "internvl",
        "llama-3-groups",
        "seed_oss",
        "deepseek_v3-yarn",
        "gpt_oss-yarn",
    ),
    "cp2-ep2": ("qwen3_moe", "gpt_oss"),
    "tp4-sp": ("qwen3-12-heads",),
    "tp2-sp-pp2-ep2": ("qwen2_moe", "deepseek_v3", "gpt_oss"),
    "tp2-sp-dp2-ep2-etp2": ("mixtral", "deepseek_v3", "glm4_moe"),
    "tp2-sp-dp2-ep2-split": ("qwen3_moe", "gpt_oss"),
    "tp2-sp-pp2-vpp2": ("qwen3-1-group", "deepseek_v2"),
    "pp2-dp2-ep2": ("qwen3_moe",),
}
"""A whole optimizer step."""

READS: dict[str, tuple[str, ...]] = {
    "one": ("deepseek_v3", "glm4_moe"),
    "tp2": ("qwen2_moe", "deepseek_v3", "glm4_moe"),
    "cp2": ("deepseek_v2",),
    "tp2-ep2": ("qwen3_moe", "deepseek_v2", "gpt_oss"),
    "pp2-vpp2-layout-mtp": ("deepseek_v3",),
    "tp2-pp2-ep2": ("glm4_moe", "gpt_oss"),
}
"""Only logits, of models with all there is to convert: also where training is refused, and with MTP layers."""

BFLOAT16 = ("glm4", "qwen2_moe", "deepseek_v3", "gpt_oss-yarn")
CHECKPOINTS = ("qwen3", "qwen3_moe", "glm4", "mixtral", "deepseek_v3", "gpt_oss")
