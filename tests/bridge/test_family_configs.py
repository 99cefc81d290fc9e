"""The translation of config.json to Megatron's terms, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from bridge.families import family_of, spec_of
from bridge.rules import MegatronSpec
from configs.errors import ConfigError
from tests.bridge.family_models import CONFIGS, THREE_GROUPS, YARN

SIZES: dict[str, Any] = {
    "vocab_size": 33,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def write_config(directory: Path, **values: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **values}))
    return directory


def test_translation_reads_both_generations_of_rope(tmp_path: Path) -> None:
    _, spec = spec_of(write_config(tmp_path, rope_theta=500000.0))
    assert spec.rotary_base == 500000.0
    assert spec.head_dim == 4
    new = {"rope_type": "default", "rope_theta": 1e6}
    _, spec = spec_of(write_config(tmp_path, rope_parameters=new))
    assert spec.rotary_base == 1e6
    assert spec.rope_scaling_factor is None
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    for values in (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}},
        {"rope_scaling": {"type": "llama3", **scaling}, "rope_theta": 5e5},
    ):
        _, spec = spec_of(write_config(tmp_path, **values))
        assert (spec.rope_scaling_factor, spec.rotary_base) == (8.0, 5e5)


def concentration(factor: float, scale: float) -> float:
    """YaRN's factor on lengths, https://arxiv.org/abs/2309.00071, as Megatron and transformers have it."""
    return 0.1 * scale * math.log(factor) + 1


@pytest.mark.parametrize("more", [{}, {"truncate": False}, {"mscale": 0.7, "mscale_all_dim": 0.9}])
def test_yarn_of_plain_attention_has_megatrons_names(more: dict[str, Any]) -> None:
    config = transformers.GptOssConfig(**THREE_GROUPS, head_dim=4, rope_parameters={**YARN, **more})
    spec = family_of(config.to_dict()).megatron(config.to_dict())
    assert spec.rotary_base == 150000.0
    assert spec.yarn == {
        "rotary_scaling_factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": more.get("mscale"),
        "mscale_all_dim": more.get("mscale_all_dim"),
        "correction_range_round_to_int": more.get("truncate", True),
    }


@pytest.mark.parametrize("more", [{}, {"mscale": 0.7}, {"mscale": 0.7, "mscale_all_dim": 0.9}])
def test_yarn_of_latent_attention_scales_as_transformers_does(more: dict[str, Any]) -> None:
    values = {**CONFIGS["deepseek_v3"].to_dict(), "rope_parameters": {**YARN, **more}}
    config = transformers.DeepseekV3Config.from_dict(values)
    shape = family_of(config.to_dict()).megatron(config.to_dict()).transformer
    assert (shape["rope_type"], shape["rotary_base"], shape["rotary_scaling_factor"]) == (
        "yarn",
        150000.0,
        4.0,
    )
    numerator, denominator = (concentration(4, shape[key]) for key in ("mscale", "mscale_all_dim"))
    embedding = DeepseekV3RotaryEmbedding(config)
    assert numerator / denominator == pytest.approx(embedding.attention_scaling)
    softmax = denominator**2 / math.sqrt(shape["qk_head_dim"] + shape["qk_pos_emb_head_dim"])
    assert softmax == pytest.approx(DeepseekV3Attention(config, 0).scaling)


# As their authors released them, apart from the quantization.
RELEASED: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "vocab_size": 201088,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


def released(directory: Path, name: str) -> MegatronSpec:
    (directory / "config.json").write_text(json.dumps(RELEASED[name]))
    return spec_of(directory)[1]


def test_deepseek_v3_as_released(tmp_path: Path) -> None:
    spec = released(tmp_path, "DeepSeek-V3")
    shape = spec.transformer
    assert (spec.num_layers, spec.mtp_layers, spec.num_experts) == (61, 1, 256)
    assert shape["moe_layer_freq"] == [0] * 3 + [1] * 58
    assert (shape["moe_router_num_groups"], shape["moe_router_group_topk"]) == (8, 4)
    assert (shape["mscale"], shape["mscale_all_dim"], shape["rotary_scaling_factor"]) == (1.0, 1.0, 40.0)
    assert (spec.head_dim, shape["q_lora_rank"], shape["v_head_dim"]) == (192, 1536, 128)


def test_gpt_oss_as_released(tmp_path: Path) -> None:
    spec = released(tmp_path, "gpt-oss-20b")
    assert spec.yarn is not None
    assert spec.yarn["rotary_scaling_factor"] == 32.0
    assert spec.transformer["window_size"] == (127, 0)
    assert spec.transformer["window_attn_skip_freq"] == [1, 0] * 12


def test_qwen3_moe_as_released(tmp_path: Path) -> None:
    spec = released(tmp_path, "Qwen3-30B-A3B")
    assert (spec.num_experts, spec.head_dim, spec.rotary_base) == (128, 128, 1e6)
    assert spec.transformer["moe_router_pre_softmax"] is False


@pytest.mark.parametrize(
    ("model", "values", "words"),
    [
        ("llama", {"model_type": "gpt2"}, "'gpt2' is not supported; supported are: deepseek_v2, deepseek_v3"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}, "attention_factor 1.5"),
        ("llama", {"attention_bias": True}, "attention_bias True with mlp_bias False"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias is True"),
        (
            "qwen3_moe",
            {"num_experts_per_tok": 1, "norm_topk_prob": True},
            "norm_topk_prob with num_experts_per_tok 1",
        ),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7, the model has 6 experts"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias is True"),
        ("glm4", {"rope_parameters": YARN}, "rope_type is 'yarn'"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        (
            "deepseek_v2",
            {
                "topk_method": "group_limited_greedy",
                "n_group": 3,
                "topk_group": 2,
                "num_experts_per_tok": 4,
            },
            "num_experts_per_tok 4 with topk_group 2 is not supported: Megatron scores a group by its 2",
        ),
        (
            "deepseek_v3",
            {"num_experts_per_tok": 2},
            "scores a group by its 1 best experts, transformers by 2",
        ),
        ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 3}, "make no router"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob False with num_experts_per_tok 4"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
        ("deepseek_v3", {"rope_parameters": {**YARN, "truncate": False}}, "truncate"),
        ("deepseek_v3", {"rope_parameters": {**YARN, "mscale_all_dim": 0.9}}, "needs mscale as well"),
        ("gpt_oss", {"swiglu_alpha": 2.0}, "swiglu_alpha is 2.0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, model: str, values: dict[str, Any], words: str
) -> None:
    config = {**CONFIGS[model].to_dict(), **values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=words) as caught:
        spec_of(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert str(caught.value).count("config.json") == 1


@pytest.mark.parametrize(("groups", "chosen"), [(1, 1), (4, 4), (None, None)])
def test_groups_that_limit_nothing_are_left_out(groups: int | None, chosen: int | None) -> None:
    config = {**CONFIGS["deepseek_v3"].to_dict(), "n_group": groups, "topk_group": chosen}
    assert "moe_router_num_groups" not in family_of(config).megatron(config).transformer


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: "):
        spec_of(tmp_path)
