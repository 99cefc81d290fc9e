"""The options of `bascule export` and `bascule infer`, as typed on the command line."""

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.export import ExportConfig, InferConfig
from configs.load import dump_config, load_settings
from configs.options import describe_options, list_options
from configs.schema import CheckpointConfig, LayoutConfig
from configs.sizes import parse_size

TO_MCORE = ("--model", "m", "--to_mcore", "true", "--output_dir", "out")
TO_HF = ("--mcore_model", "c", "--to_hf", "true", "--output_dir", "out")


def complaint(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(ExportConfig, None, words)
    return str(caught.value)


def test_the_command_of_the_issue_works_as_written() -> None:
    words = (
        "--model DIR --to_mcore true --output_dir OUT --tensor_model_parallel_size 2 "
        "--pipeline_model_parallel_size 2 --expert_model_parallel_size 2 --test_convert_precision true"
    )
    config = load_settings(ExportConfig, None, words.split())
    assert config == ExportConfig(
        model="DIR",
        to_mcore=True,
        output_dir=Path("OUT"),
        layout=LayoutConfig(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=2, expert_model_parallel_size=2
        ),
        test_convert_precision=True,
    )
    assert (config.torch_dtype, config.precision_threshold, config.max_shard_size) == (None, 0.1, "5GB")
    assert load_settings(ExportConfig, None, TO_HF).mcore_model == Path("c")


@pytest.mark.parametrize(
    "words",
    [
        (*TO_MCORE, "--adapters", "a"),
        (*TO_MCORE, "--adapters", "a", "--merge_lora"),
        ("--model", "m", "--to_hf", "true", "--output_dir", "out", "--mcore_adapter", "a"),
        ("--model", "m", "--to_hf", "true", "--output_dir", "out", "--adapters", "a", "--merge_lora"),
        (*TO_HF, "--mcore_adapter", "a", "--merge_lora", "true"),
    ],
)
def test_conversions_of_adapters(words: tuple[str, ...]) -> None:
    config = load_settings(ExportConfig, None, words)
    assert config.merge_lora == ("--merge_lora" in words)


def test_a_file_and_a_dump_give_the_same_config(tmp_path: Path) -> None:
    path = tmp_path / "export.yaml"
    path.write_text("mcore_model: c\nto_hf: true\noutput_dir: out\nlayout: {sequence_parallel: true}\n")
    words = ("--tensor_model_parallel_size", "2", "--max_shard_size", "500MB")
    config = load_settings(ExportConfig, path, words)
    assert config.layout.sequence_parallel
    assert config.max_shard_size == "500MB"
    path.write_text(dump_config(config))
    assert load_settings(ExportConfig, path, ()) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output_dir", "out", "--model", "m"), "exactly one of --to_mcore true"),
        ((*TO_MCORE, "--to_hf", "true", "--mcore_model", "c"), "exactly one of --to_mcore true"),
        (TO_MCORE[2:], "model: --to_mcore true needs the Hugging Face directory"),
        ((*TO_MCORE, "--mcore_model", "c"), "mcore_model: is the source of --to_hf true"),
        (TO_HF[2:], "mcore_model: --to_hf true needs the torch_dist directory"),
        (TO_MCORE[:-2], "output_dir is required"),
        ((*TO_MCORE, "--sequence_parallel"), "needs tensor_model_parallel_size of 2 or more"),
        ((*TO_MCORE, "--torch_dtype", "int8"), "torch_dtype is 'int8'"),
        ((*TO_MCORE, "--max_shard_size", "5 stones"), "'5 stones' is no size"),
        ((*TO_MCORE, "--precision_threshold", "0"), "precision_threshold is 0"),
        ((*TO_MCORE, "--to_mcor", "true"), "did you mean --to_mcore?"),
        ((*TO_MCORE, "--merge_lora"), "merge_lora: there is nothing to merge"),
        ((*TO_MCORE, "--mcore_adapter", "a"), "mcore_adapter: is torch_dist already; use --to_hf true"),
        ((*TO_HF, "--adapters", "a"), "adapters: is safetensors already; use --to_mcore true"),
        ((*TO_HF, "--adapters", "a", "--mcore_adapter", "b"), "give it or adapters, not both"),
        ((*TO_HF[2:], "--mcore_adapter", "b"), "model: give the model that the adapter is for"),
    ],
)
def test_wrong_options_are_named(words: tuple[str, ...], message: str) -> None:
    assert message in complaint(*words)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("1.5 gb", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("2KIB", 2048),
        ("1TB", 10**12),
        ("1000", 1000),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 G B", "0", "0.1B", "5XB", "1e9", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_size(text)
    with pytest.raises(ValueError, match="no size"):
        CheckpointConfig(max_shard_size=text)


def test_infer_options() -> None:
    config = load_settings(
        InferConfig, None, ("--model", "m", "--prompt", "2026", "--stream", "--chat", "false")
    )
    assert (config.prompt, config.stream, config.chat, config.temperature) == ("2026", True, False, 0.0)
    with pytest.raises(ConfigError, match="system_prompt: has no place without the chat template"):
        load_settings(
            InferConfig, None, ("--model", "m", "--prompt", "a", "--system_prompt", "b", "--chat", "false")
        )


@pytest.mark.parametrize("schema", [ExportConfig, InferConfig])
def test_help_names_every_option_and_its_text(schema: type[ExportConfig] | type[InferConfig]) -> None:
    shown = describe_options(schema)
    for option in list_options(schema):
        assert f"--{option.dotted}" in shown
        assert option.field.description
