import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from bridge.families import FAMILIES, family_of, spec_of
from bridge.megatron import check_all_read, claim_pieces
from bridge.plan import TensorInfo
from bridge.rules import RuleError, check_layout
from configs.errors import ConfigError
from configs.schema import TrainerConfig

SIZES: dict[str, Any] = {
    "vocab_size": 33,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_rules_name_every_tensor_of_transformers_model_and_no_other(config: PretrainedConfig) -> None:
    family = family_of(config.to_dict())
    spec = family.megatron(config.to_dict())
    with torch.device("meta"):
        names = set(AutoModelForCausalLM.from_config(config).state_dict())
    ruled = {
        name.replace("{L}", str(layer))
        for rule in family.rules
        for name in rule.hf
        for layer in range(spec.num_layers)
    }
    assert set(family.to_read(spec, names)) <= ruled
    # What the rules know beyond this model are only biases and norms that other members have.
    assert {name for name in ruled - names if not name.endswith((".bias", "_norm.weight"))} == set()


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
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    _, spec = spec_of(write_config(tmp_path, rope_parameters=scaling))
    assert spec.rope_scaling_factor == 8.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are: llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"attention_bias": True}, "attention_bias True with mlp_bias False"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec_of(write_config(tmp_path, **values))


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: "):
        spec_of(tmp_path)


def test_a_layout_that_does_not_divide_lists_everything(tmp_path: Path) -> None:
    _, spec = spec_of(write_config(tmp_path))
    check_layout(spec, TrainerConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2))
    with pytest.raises(ConfigError) as caught:
        check_layout(spec, TrainerConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=3))
    message = str(caught.value)
    for words in ("6 attention heads", "2 query groups", "2 layers"):
        assert words in message
    assert "feed-forward" not in message


def claim(parameters: dict[str, torch.Size], shapes: dict[str, tuple[int, ...]]) -> None:
    config = CONFIGS["llama"].to_dict()
    family = FAMILIES[0]
    claim_pieces(
        family,
        family.megatron(config),
        {name: torch.nn.Parameter(torch.empty(shape)) for name, shape in parameters.items()},
        {name: TensorInfo(name=name, dtype=torch.float32, shape=shape) for name, shape in shapes.items()},
        rank=0,
        tensor_parallel_rank=0,
        tensor_parallel_size=1,
    )


def test_everything_that_does_not_fit_is_listed_at_once() -> None:
    with pytest.raises(RuleError) as caught:
        claim(
            {
                "decoder.final_layernorm.weight": torch.Size([24]),
                "decoder.layers.0.input_layernorm.weight": torch.Size([24]),
                "decoder.layers.0.mlp.mystery": torch.Size([1]),
            },
            {"model.norm.weight": (23,)},
        )
    message = str(caught.value)
    assert "decoder.layers.0.mlp.mystery has no rule" in message
    assert "needs model.layers.0.input_layernorm.weight" in message
    assert "model.norm.weight [(23,)]: the rank's share has 23 elements, the parameter (24,)" in message


def test_a_tensor_that_nobody_reads_is_named() -> None:
    check_all_read(["a"], {"a", "b"})
    with pytest.raises(RuleError, match="checkpoint: c, d"):
        check_all_read(["a", "c", "d"], {"a", "b"})
