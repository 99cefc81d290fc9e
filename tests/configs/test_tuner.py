"""The options of LoRA, as typed on the command line."""

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import dump_config, load_config
from configs.schema import RunConfig

NEEDED = ("--model", "m", "--dataset", "d.jsonl", "--rewards.0.function", "exact_match")


def load(*words: str, algorithm: str = "grpo") -> RunConfig:
    return load_config(None, [*NEEDED, *words], algorithm)


def test_the_options_of_the_field_work_as_written() -> None:
    words = "--tuner_type lora --lora_rank 16 --lora_alpha 32 --lora_dropout 0.05 --target_modules all-linear"
    tuner = load(*words.split()).tuner
    assert (tuner.lora_rank, tuner.lora_alpha, tuner.lora_dropout) == (16, 32.0, 0.05)
    assert tuner.target_modules == ("all-linear",)
    assert load("--tuner_type", "lora", "--adapters", "a").tuner.adapters == Path("a")


@pytest.mark.parametrize(
    ("algorithm", "words", "dropout"),
    [
        # ms-swift's and the one of PEFT's examples.
        ("sft", "--tuner_type lora", 0.05),
        ("sft", "--tuner_type lora --adapters a", None),
        ("grpo", "--tuner_type lora", 0.0),
        ("grpo", "--tuner_type lora --adapters a", 0.0),
        ("gkd", "--tuner_type lora --teacher_model t", 0.0),
        ("grpo", "--tuner_type lora --lora_dropout 0.1", 0.1),
        ("sft", "--tuner_type lora --lora_dropout 0", 0.0),
        ("sft", "--tuner_type lora --mcore_adapter a --lora_dropout 0", 0.0),
        ("grpo", "", None),
    ],
)
def test_the_default_dropout_is_the_algorithms_and_is_written_out(
    algorithm: str, words: str, dropout: float | None, tmp_path: Path
) -> None:
    config = load(*words.split(), algorithm=algorithm)
    assert config.tuner.lora_dropout == dropout
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml", [], algorithm) == config
    assert RunConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("text", ["q_proj,v_proj", "q_proj, v_proj", "[q_proj, v_proj]"])
def test_names_come_with_commas_or_as_a_list(text: str) -> None:
    assert load("--tuner_type", "lora", "--target_modules", text).tuner.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lora_rank 4", "tuner.lora_rank: is not used while tuner.tuner_type is full"),
        (
            "--tuner_type lora --adapters a --lora_rank 3",
            "tuner.lora_rank: is the adapter's own with tuner.adapters",
        ),
        ("--tuner_type lora --adapters a --mcore_adapter b", "give it or tuner.adapters, not both"),
        ("--tuner_type lora --target_modules all-linear,lm_head", "all-linear stands alone"),
        ("--vllm_enable_lora true", "rollout.vllm_enable_lora: needs tuner.tuner_type lora"),
        (
            "--tuner_type lora --vllm_enable_lora true --modules_to_save lm_head",
            "cannot replace whole modules",
        ),
        ("--tuner_type lora --vllm_enable_lora true --mcore_model c", "read the base model from safetensors"),
    ],
)
def test_what_contradicts_itself_is_named(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*words.split())
    assert message in str(caught.value)
