"""Which models fit which layouts, and what is said about those that do not."""

from dataclasses import replace
from typing import Any

import pytest

from bridge.fit import check_layout, moe_pattern, pipeline_stages, virtual_stages
from bridge.rules import MegatronSpec, VisionSpec
from configs.errors import ConfigError
from configs.schema import LayoutConfig

SPEC = MegatronSpec(
    transformer={
        "num_layers": 6,
        "hidden_size": 24,
        "num_attention_heads": 12,
        "num_query_groups": 3,
        "kv_channels": 4,
        "ffn_hidden_size": 36,
        "add_bias_linear": False,
    },
    vocab_size=131,
    max_sequence_length=64,
    rotary_base=10000.0,
    tie_word_embeddings=False,
)
EXPERTS = {"num_moe_experts": 6, "moe_ffn_hidden_size": 10, "moe_layer_freq": [0, 1, 1, 1, 1, 1]}
LATENT = {"multi_latent_attention": True, "num_query_groups": 12}


def spec_with(values: dict[str, Any]) -> MegatronSpec:
    return replace(SPEC, transformer={**SPEC.transformer, **values})


def layout(text: str) -> LayoutConfig:
    """tp2 pp3 ... as options."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "dp": "data_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "first": "num_layers_in_first_pipeline_stage",
        "last": "num_layers_in_last_pipeline_stage",
    }
    options: dict[str, Any] = {}
    for word in text.split():
        name = word.rstrip("0123456789")
        if "|" in word:
            options["pipeline_model_parallel_layout"] = word
        elif name == "sp":
            options["sequence_parallel"] = True
        else:
            options[names[name]] = int(word.removeprefix(name))
    return LayoutConfig.model_validate(options)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "tp3 pp2 dp5"),
        ({}, "tp6 pp3 vpp2"),
        ({}, "pp3 first1 last1"),
        ({}, "pp3 first1 last2"),
        ({}, "pp2 first2"),
        ({}, "pp4 vpp2 Et|t|t|t|t|t|,|L"),
        ({}, "pp2 Et*2|t*2|t|t,L"),
        (EXPERTS, "tp3 sp etp1 ep3"),
        (EXPERTS, "tp1 dp2 ep2"),
        (EXPERTS, "cp2 ep2"),
        (EXPERTS | {"add_bias_linear": True}, "dp3 ep3"),
        (EXPERTS | LATENT, "tp4 sp etp2 ep2"),
    ],
)
def test_a_layout_that_fits(values: dict[str, Any], text: str) -> None:
    check_layout(spec_with(values), layout(text))


@pytest.mark.parametrize(
    ("values", "text", "words"),
    [
        ({}, "tp5", "tensor_model_parallel_size 5 does not divide the model's 12 attention heads"),
        ({}, "tp2", "2 does not divide the model's 3 query groups"),
        ({}, "tp4", "4 is not a multiple of the model's 3 query groups"),
        ({"num_query_groups": 1, "kv_channels": 2}, "tp3", "28 rows of query, key and value"),
        ({"ffn_hidden_size": 35}, "tp3", "35 feed-forward size"),
        ({}, "ep2 dp2", "expert_model_parallel_size 2 is for models with experts"),
        ({}, "sp", "sequence_parallel needs tensor_model_parallel_size of 2"),
        ({}, "pp4", "pipeline_model_parallel_size 4 does not divide the model's 6 layers"),
        ({}, "pp2 vpp2", "4 does not divide the model's 6 layers"),
        ({}, "vpp2", "need pipeline_model_parallel_size of 2"),
        (
            {},
            "pp3 first3 last2 vpp2",
            "virtual_pipeline_model_parallel_size 2 does not divide num_layers_in_first",
        ),
        ({}, "pp3 first1 vpp2", "the 5 layers between"),
        ({}, "pp2 first5 last2", "the -1 layers between"),
        ({}, "pp2 Et*5|L", "has 5 layers t, the model 6"),
        ({}, "pp2 t*6|L", "has to be one E"),
        ({}, "pp2 Et*6||L", "has 3 stages"),
        ({}, "pp3 Et*3||t*3,L", "leaves a pipeline rank without anything"),
        ({}, "pp2 vpp2 Et*6|L", "has 2 stages"),
        ({}, "pp2 Et*6|m,L", "the model's 0 layers m"),
        ({}, "pp2 first1 Et*6|L", "excludes num_layers_in_first"),
        (EXPERTS, "tp3", "training experts with tensor_model_parallel_size above 1 needs sequence_parallel"),
        (EXPERTS, "tp3 sp", "expert_tensor_parallel_size 3 does not divide the model's 10 feed-forward size"),
        (EXPERTS, "dp4 ep4", "expert_model_parallel_size 4 does not divide the model's 6 experts"),
        (EXPERTS, "dp2 ep3", "expert_model_parallel_size 3 times expert_tensor_parallel_size 1"),
        (EXPERTS | {"add_bias_linear": True}, "dp2 etp2", "set expert_tensor_parallel_size to 1"),
        (
            EXPERTS | {"moe_shared_expert_intermediate_size": 8},
            "tp3 sp etp1",
            "8 feed-forward size of shared",
        ),
        (LATENT, "tp2", "training latent attention"),
    ],
)
def test_a_layout_that_does_not_fit(values: dict[str, Any], text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(spec_with(values), layout(text))
    assert words in str(caught.value)


def test_all_that_is_wrong_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(spec_with(EXPERTS), layout("tp5 pp4 ep4"))
    for words in ("attention heads", "query groups", "feed-forward size", "6 experts", "layers", "training"):
        assert words in str(caught.value)


def test_what_is_only_wrong_for_gradients_may_be_converted() -> None:
    check_layout(spec_with(EXPERTS), layout("tp3 etp1 ep3"), training=False)
    check_layout(spec_with(LATENT), layout("tp2"), training=False)


@pytest.mark.parametrize("text", ["pp3 vpp2", "pp2 first2", "pp3 last4", "pp2 Et*2|t*4,L"])
def test_layers_that_take_in_features_are_on_the_first_stage(text: str) -> None:
    vision = VisionSpec(
        tower="",
        config={},
        image_token_id=1,
        video_token_id=2,
        spatial_merge_size=2,
        aligner=(),
        mrope_section=(1, 1, 0),
        mrope_interleaved=True,
        deepstack=3,
    )
    spec = replace(SPEC, vision=vision)
    with pytest.raises(ConfigError, match="the first 3 take in features of the vision tower"):
        check_layout(spec, layout(text))
    check_layout(spec, layout(text), training=False)
    check_layout(spec, layout("pp2"))


def test_layers_for_multi_token_prediction_go_last() -> None:
    spec = replace(SPEC, mtp_layers=1)
    check_layout(spec, layout("pp2 Et*3|t*3,m,L"))
    with pytest.raises(ConfigError, match="1 layers m go with the last stage"):
        check_layout(spec, layout("pp3 Et*3|t*3,m|L"))
    with pytest.raises(ConfigError, match="does not divide the model's 25 hidden size"):
        check_layout(replace(spec_with({"hidden_size": 25}), mtp_layers=1), layout("tp3"))


def test_layers_with_experts() -> None:
    assert moe_pattern(SPEC) == [False] * 6
    assert moe_pattern(spec_with(EXPERTS)) == [False] + [True] * 5
    assert moe_pattern(spec_with({**EXPERTS, "moe_layer_freq": 2})) == [True, False] * 3


def test_stages_in_megatrons_notation() -> None:
    # The example in megatron.core's PipelineParallelLayerLayout.
    assert pipeline_stages("Ettt|(tt|)*29,m|L") == ["Ettt", *["tt"] * 29, "m", "L"]
    assert virtual_stages(layout("pp2 Et|t|t|L")) == 2
    assert virtual_stages(layout("pp4 Et|t|t|L")) is None
    assert virtual_stages(layout("pp2")) is None
    assert virtual_stages(layout("pp2 vpp3")) == 3
