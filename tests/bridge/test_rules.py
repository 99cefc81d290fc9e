"""The language of the tables."""

import pytest
import torch

from bridge.families import family_of
from bridge.fit import check_layout
from bridge.layouts import Replicated, Row
from bridge.megatron import Place, claim_pieces
from bridge.plan import TensorInfo
from bridge.rules import Copy, Family, MegatronSpec, Rule, RuleError
from configs.errors import ConfigError
from configs.schema import TrainerConfig
from tests.bridge.family_models import CONFIGS

ALONE = Place(rank=0, tensor_rank=0, tensor_size=1, expert_tensor_rank=0, expert_tensor_size=1)


def spec(*, tied: bool = False, mtp: int = 0) -> MegatronSpec:
    return MegatronSpec(
        transformer={"num_layers": 5},
        vocab_size=33,
        max_sequence_length=8,
        rotary_base=1e4,
        tie_word_embeddings=tied,
        mtp_layers=mtp,
    )


FAMILY = Family(
    model_types=("toy",),
    rules=(
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Replicated()),
        Rule("decoder.layers.{L}.experts.{E}.weight", ("layers.{L}.experts.{E}.one",), Row()),
        Rule("decoder.layers.{L}.experts.{E}.weight", ("layers.{L}.all",), Replicated()),
        Rule("output_layer.weight", ("lm_head.weight",), Replicated()),
        Rule("mtp.layers.{M}.norm", ("layers.{N}.norm", "extra.{M}"), Replicated()),
    ),
    megatron=lambda hf: spec(),
    copies=(
        Copy("model.layers.{N}.embed", "model.embed_tokens.weight"),
        Copy("model.layers.{N}.head", "lm_head.weight"),
    ),
)


def test_alternatives_come_in_the_order_of_the_table_with_their_names_filled_in() -> None:
    matches = FAMILY.matches("decoder.layers.12.experts.3.weight", num_layers=20)
    assert [match.hf_names for match in matches] == [("layers.12.experts.3.one",), ("layers.12.all",)]
    assert [match.expert for match in matches] == [3, 3]


def test_extra_layers_are_numbered_after_the_decoder() -> None:
    (match,) = FAMILY.matches("mtp.layers.1.norm", num_layers=5)
    assert match.hf_names == ("layers.6.norm", "extra.1")
    assert match.expert is None
    assert FAMILY.is_extra_layer(spec(mtp=1), "model.layers.5.mlp.experts.0.up_proj.weight")
    assert not FAMILY.is_extra_layer(spec(mtp=1), "model.layers.4.mlp.experts.9.up_proj.weight")
    assert not FAMILY.is_extra_layer(spec(), "model.layers.5.norm")
    assert not FAMILY.is_extra_layer(spec(mtp=1), "lm_head.weight")


def test_a_parameter_without_a_rule_matches_nothing() -> None:
    assert FAMILY.matches("decoder.layers.0.experts.weight", 5) == []
    assert FAMILY.matches("decoder.layers.0.experts.0.bias", 5) == []


def test_copies_lead_to_the_tensor_that_is_read() -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.5.embed", "model.layers.5.head"]
    embedding, head, extra_embedding, extra_head = names
    assert FAMILY.copies_in(spec(), names) == {}
    assert FAMILY.copies_in(spec(mtp=2), names) == {extra_embedding: embedding, extra_head: head}
    tied = {head: embedding, extra_embedding: embedding, extra_head: embedding}
    assert FAMILY.copies_in(spec(tied=True, mtp=2), names) == tied
    assert FAMILY.copies_in(spec(tied=True, mtp=1), [embedding, extra_head]) == {extra_head: embedding}


def test_a_layout_that_does_not_divide_lists_everything() -> None:
    config = CONFIGS["llama tied"].to_dict()
    spec = family_of(config).megatron(config)
    check_layout(spec, TrainerConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2))
    with pytest.raises(ConfigError) as caught:
        check_layout(spec, TrainerConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=3))
    message = str(caught.value)
    for words in ("12 attention heads", "2 layers"):
        assert words in message
    assert "feed-forward" not in message


def claim(parameters: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> None:
    config = CONFIGS["llama"].to_dict()
    family = family_of(config)
    claim_pieces(
        family,
        family.megatron(config),
        {name: torch.nn.Parameter(torch.empty(shape)) for name, shape in parameters.items()},
        {name: TensorInfo(name=name, dtype=torch.float32, shape=shape) for name, shape in shapes.items()},
        ALONE,
    )


def test_everything_that_does_not_fit_is_listed_at_once() -> None:
    with pytest.raises(RuleError) as caught:
        claim(
            {
                "decoder.final_layernorm.weight": (24,),
                "decoder.layers.0.input_layernorm.weight": (24,),
                "decoder.layers.0.mlp.mystery": (1,),
            },
            {"model.norm.weight": (23,)},
        )
    message = str(caught.value)
    assert "decoder.layers.0.mlp.mystery has no rule" in message
    assert "the checkpoint does not have model.layers.0.input_layernorm.weight" in message
    assert "model.norm.weight is [23] in the checkpoint, the model needs [24]" in message
