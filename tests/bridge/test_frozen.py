"""Which parameters a pattern of Hugging Face names takes out of training."""

import re

import pytest

from bridge.families import family_of
from bridge.frozen import frozen_parameters
from bridge.parameters import parameters_of
from configs.errors import ConfigError

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def frozen(*patterns: str, **config: object) -> frozenset[str]:
    family = family_of({**CONFIG, **config})
    return frozen_parameters(family, family.megatron({**CONFIG, **config}), None, patterns)


def test_patterns_match_whole_names_of_the_checkpoint() -> None:
    assert frozen() == frozenset()
    assert frozen("model.embed_tokens.*") == {"embedding.word_embeddings.weight"}
    assert frozen("model.layers.?.mlp.down_proj.weight", "lm_head.weight") == {
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.1.mlp.linear_fc2.weight",
        "output_layer.weight",
    }
    assert frozen("*.[qk]_proj.weight", "*.v_proj.*") == {
        f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in (0, 1)
    }
    family = family_of(CONFIG)
    first = {name for name in parameters_of(family.megatron(CONFIG), mtp=False) if ".layers.0." in name}
    assert frozen("model.layers.0.*") == first


def test_a_tied_head_is_frozen_with_the_embedding() -> None:
    assert frozen("model.embed_tokens.*", tie_word_embeddings=True) == {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
    }
    with pytest.raises(
        ConfigError, match=r"no parameter of the model is called lm_head\.\*.*its head is its emb"
    ):
        frozen("lm_head.*", tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ("*.q_proj.weight",),
            "model.layers.0.self_attn.q_proj.weight is matched, model.layers.0.self_attn.k_proj.weight, "
            "model.layers.0.self_attn.v_proj.weight is not, and Megatron keeps them in one parameter, "
            "decoder.layers.0.self_attention.linear_qkv.weight",
        ),
        (("*.gate_proj.*",), "model.layers.0.mlp.gate_proj.weight is matched, model.layers.0.mlp.up_proj"),
        (
            ("*norm*", "embed_tokens"),
            "no parameter of the model is called embed_tokens; a pattern matches the",
        ),
        (("*",), "the patterns match every parameter"),
    ],
)
def test_patterns_that_cannot_be(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"trainer.freeze: {message}")):
        frozen(*patterns)
