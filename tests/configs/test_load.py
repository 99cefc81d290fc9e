"""Config files and overrides, against values read by hand and against the schema's own constructors."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from configs.data import DataConfig
from configs.errors import ConfigError
from configs.load import dump_config, load_config, load_settings
from configs.options import describe_options, list_options, resolve_key
from configs.rewards import RewardConfig
from configs.schema import ModelConfig, RunConfig, TrainerConfig, with_steps_of_epochs

NEEDED = ("--model", "m", "--dataset", "d.jsonl", "--rewards.0.function", "exact_match")


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def complaint(path: Path | None, *words: str, algorithm: str = "grpo") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [*NEEDED, *words], algorithm)
    return str(caught.value)


def test_file_and_overrides_give_the_config_that_the_schema_gives(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "algorithm: grpo\nmodel: {model: base}\ntrainer:\n  lr: 1e-6\n  clip_grad: 0.5\ndata:\n"
        "  dataset: a.jsonl\nrewards:\n- function: exact_match\n",
    )
    words = ["--trainer.lr", "1e-5", "--data.system_prompt=Think: then answer", "--rewards.0.weight", "2"]
    assert load_config(path, words, "grpo") == RunConfig(
        model=ModelConfig(model="base"),
        trainer=TrainerConfig(lr=1e-5, clip_grad=0.5),
        data=DataConfig(dataset=("a.jsonl",), system_prompt="Think: then answer"),
        rewards=(RewardConfig(function="exact_match", weight=2.0),),
    )


@pytest.mark.parametrize(
    ("words", "section", "name", "value"),
    [
        (["--trainer.lr", "1e-6"], "trainer", "lr", 1e-6),
        (["--lr=.5"], "trainer", "lr", 0.5),
        (["--tensor_model_parallel_size", "2"], "trainer", "tensor_model_parallel_size", 2),
        (["--tensor_model_parallel_size", "2", "--sequence_parallel"], "trainer", "sequence_parallel", True),
        (["--enforce_eager", "false"], "rollout", "enforce_eager", False),
        (["--grpo.stop", "[a, 'b']"], "grpo", "stop", ("a", "b")),
        (["--stop.0", "no: x", "--grpo.stop.1", "7"], "grpo", "stop", ("no: x", "7")),
        (["--epsilon_high", "0.3", "--epsilon_high", "null"], "grpo", "epsilon_high", None),
        (["--top_k", "-1"], "grpo", "top_k", -1),
        (["--eval_dataset", "2026"], "data", "eval_dataset", ("2026",)),
        (["--eval_dataset", "null"], "data", "eval_dataset", ()),
        (["--eval_dataset", "'null'"], "data", "eval_dataset", ("null",)),
        (["--freeze", "*.bias, model.layers.[01].*"], "trainer", "freeze", ("*.bias", "model.layers.[01].*")),
        (
            ["--dataset_kwargs.a", "3", "--data.dataset_kwargs.b", "no"],
            "data",
            "dataset_kwargs",
            {"a": 3, "b": "no"},
        ),
        (["--dataset_kwargs", "{a: 1e3, b: true}"], "data", "dataset_kwargs", {"a": 1000.0, "b": True}),
    ],
)
def test_override_forms(words: list[str], section: str, name: str, value: object) -> None:
    config = load_config(None, [*NEEDED, *words], "grpo").model_dump()
    assert config[section][name] == value
    assert type(config[section][name]) is type(value)


def test_list_items_are_set_and_appended_by_index() -> None:
    config = load_config(
        None, [*NEEDED, "--rewards.1.function=f.py:g", "--rewards.1.kwargs.pattern", "a.*"], "grpo"
    )
    assert config.rewards == (
        RewardConfig(function="exact_match"),
        RewardConfig(function="f.py:g", kwargs={"pattern": "a.*"}),
    )
    assert "1 items, so the next is 1" in complaint(None, "--rewards.3.weight", "1")


def test_sections_with_all_keys_commented_out_are_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "trainer:\n  # lr: 1\nmodel:\nrollout: {}\n")
    assert load_config(path, NEEDED, "grpo") == load_config(None, NEEDED, "grpo")


def test_a_command_line_that_does_not_fit(tmp_path: Path) -> None:
    assert "--trainer.lrr is not an option; did you mean --trainer.lr?" in complaint(
        None, "--trainer.lrr", "1"
    )
    assert "did you mean --trainer.lr?" in complaint(None, "--grpo.lr", "1")
    ambiguous = "--weight is ambiguous; write --environment.weight or --rewards.N.weight"
    assert ambiguous in complaint(None, "--weight", "1")
    assert "--trainer is a section" in complaint(None, "--trainer", "1")
    assert "--lr needs a value, FLOAT" in complaint(None, "--lr", "--seed", "1")
    assert "'2' belongs to no option" in complaint(None, "--seed", "1", "2")
    assert "--lr: '[1' is not valid YAML; wanted FLOAT" in complaint(None, "--lr", "[1")
    assert "command line: --trainer.lr is 'fast'; should be a valid number" in complaint(None, "--lr", "fast")
    path = write(tmp_path, "trainer: 5\n")
    assert "--trainer.lr does not fit the file, which has 5 there" in complaint(path, "--trainer.lr", "1")


def test_ambiguous_leaf_names_its_candidates() -> None:
    class Left(BaseModel):
        size: int = 1

    class Right(BaseModel):
        size: int = 1

    class Both(BaseModel):
        left: Left = Left()
        right: Right = Right()
        seed: int = 0

    options = list_options(Both)
    with pytest.raises(ConfigError, match=r"--size is ambiguous; write --left\.size or --right\.size"):
        resolve_key("size", options)
    assert resolve_key("left.size", options)[0] == ["left", "size"]
    assert resolve_key("seed", options)[0] == ["seed"]


@pytest.mark.parametrize("algorithm", ["grpo", "gkd"])
def test_a_leaf_that_several_algorithms_have_is_that_of_the_one_that_runs(algorithm: str) -> None:
    words = [*NEEDED, "--beta", "0.25", "--max_completion_length", "7"]
    words += ["--teacher_model", "t"] if algorithm == "gkd" else []
    config = load_config(None, words, algorithm)
    found = {"grpo": (config.grpo.beta, config.grpo.max_completion_length)}
    found["gkd"] = (config.gkd.beta, config.gkd.max_completion_length)
    assert found.pop(algorithm) == (0.25, 7)
    assert list(found.values()) != [(0.25, 7)]
    options = list_options(RunConfig)
    with pytest.raises(ConfigError, match=r"--beta is ambiguous; write --grpo\.beta or --gkd\.beta"):
        resolve_key("beta", options)
    assert resolve_key("gkd.beta", options, "grpo")[0] == ["gkd", "beta"]


def test_every_complaint_about_a_file_is_one_line_with_its_place(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "seed: 1.5\nmodel: {model: m, lr: 1}\ntrianer: {}\ntrainer:\n  lr: abc\n  micro_batch_size: 0\n"
        "data:\n  dataset: 5\n  dataset_kwargs: {a: [1]}\nrewards:\n- weight: 1\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, [], "grpo")
    lines = sorted(str(caught.value).splitlines())
    expected = [
        ":11: rewards.0 is {'weight': 1}; a reward has one of function, url and model; this one has none",
        ":1: seed is 1.5; should be a valid integer",
        ":2: model.lr is not an option; did you mean trainer.lr?",
        ":3: trianer is not an option; did you mean trainer?",
        ":5: trainer.lr is 'abc'; should be a valid number",
        ":6: trainer.micro_batch_size is 0; should be greater than or equal to 1",
        ":8: data.dataset is 5; should be a valid tuple",
        ":9: data.dataset_kwargs.a is [1]; should be {NAME: TEXT|INT|FLOAT|true|false}",
    ]
    assert len(lines) == len(expected)
    for text in expected:
        assert any(line.replace(f"{path}: ", f"{path}:11: ").startswith(f"{path}{text}") for line in lines), (
            text
        )


def test_several_datasets_and_what_contradicts_another_option() -> None:
    def loaded(*words: str) -> RunConfig:
        return load_config(None, ["--model.model", "m", *words], "sft")

    assert loaded("--dataset", "a.jsonl").data.dataset == ("a.jsonl",)
    assert loaded("--dataset", "a.jsonl#5,b.parquet").data.dataset == ("a.jsonl#5", "b.parquet")
    assert loaded("--dataset", "a", "--eval_dataset", "null").data.eval_dataset == ()
    common = ("--dataset", "a")
    for words, message in (
        (
            ("--split_dataset_ratio", "0.1", "--eval_dataset", "b"),
            "data.split_dataset_ratio: is not used with",
        ),
        (
            ("--num_train_epochs", "2", "--max_steps", "5"),
            "sft.num_train_epochs: give it or max_steps, not both",
        ),
        (
            ("--lr_warmup_fraction", "0.1", "--lr_warmup_iters", "5"),
            "lr_warmup_fraction: give it or trainer.lr_",
        ),
        (
            ("--lr_warmup_iters", "100"),
            "trainer.lr_warmup_iters: a warm-up of 100 steps leaves none of the run's",
        ),
        (("--lr_warmup_fraction", "0.995"), "trainer.lr_warmup_fraction: a warm-up of 100 steps leaves none"),
        (
            ("--freeze", "*.bias", "--tuner_type", "lora"),
            "trainer.freeze: is not used with tuner.tuner_type lora",
        ),
        (
            ("--stall_timeout_s", "30", "--collective_timeout_s", "20"),
            "bridge.stall_timeout_s: 30 has to be below cluster.collective_timeout_s 20",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            loaded(*common, *words)
        assert message in str(caught.value)


def test_epochs_become_steps_and_a_fraction_a_warm_up() -> None:
    words = ["--model.model", "m", "--dataset", "a", "--sft.batch_size", "8", "--lr_warmup_fraction", "0.1"]
    config = load_config(None, [*words, "--num_train_epochs", "2.5"], "sft")
    assert load_config(None, words, "sft").lr_warmup_steps == 10
    # 2.5 x 33 samples are 82.5, which takes 11 steps of 8; a tenth of them is rounded up too.
    resolved = with_steps_of_epochs(config, 33)
    assert (resolved.max_steps, resolved.sft.num_train_epochs, resolved.lr_warmup_steps) == (11, None, 2)
    assert with_steps_of_epochs(resolved, 7) == resolved
    late = load_config(None, [*words, "--num_train_epochs", "1", "--lr_warmup_fraction", "0.9"], "sft")
    with pytest.raises(
        ConfigError, match=r"warm-up of 1 steps leaves none .*; sft\.num_train_epochs 1 is 1 steps"
    ):
        with_steps_of_epochs(late, 8)


def test_missing_options_are_named_without_their_section_being_there() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["--rewards.0.function", "exact_match"], "grpo")
    first, second = str(caught.value).splitlines()
    assert first == "model is {}; give model.model, or model.mcore_model with config and tokenizer in it"
    assert second.endswith("give it in the config file or as --data.dataset")


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("trainer:\n  lr: [1\n", ":3:", "not valid YAML"),
        ("seed: 1\nlr: 2\nseed: 3\n", ":3:", "seed is given twice"),
        ("- 1\n", ":1:", "a config file is a mapping"),
        ("seed: \x00\n", ":", "not a YAML text file"),
        ("seed: 1\n? [a]\n: 2\n", ":2:", "a key is a word"),
        ("model: &m {model: *m}\n", ":", "an alias (*name) stands inside its anchor"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, place: str, what: str) -> None:
    path = write(tmp_path, text)
    message = complaint(path)
    assert message.startswith(f"{path}{place}")
    assert what in message


def test_missing_file(tmp_path: Path) -> None:
    assert "none.yaml: this config file cannot be read: No such file" in complaint(tmp_path / "none.yaml")


def test_a_file_for_another_command_names_the_right_one(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nalgorithm: sft\n")
    assert complaint(path) == f"{path}:2: algorithm is sft, so run `bascule sft`, not `bascule grpo`"
    assert load_config(path, NEEDED, "sft").algorithm == "sft"
    assert "--algorithm is sft, so run `bascule sft`" in complaint(None, "--algorithm", "sft")
    assert "algorithm is 'x'; it is one of grpo, gkd, sft" in complaint(None, "--algorithm", "x")


def test_rules_between_sections_are_told_without_pydantics_words(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\n")
    message = complaint(path, "--steps_per_generation", "3")
    assert message == f"{path}: grpo.steps_per_generation: 3 does not divide grpo.prompts_per_step 16"


def test_dump_loads_back_equal(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(model="1e-6"),
        trainer=TrainerConfig(lr=3e-7, tensor_model_parallel_size=2, sequence_parallel=True),
        data=DataConfig(
            dataset="no", system_prompt="a: b\n# c", dataset_kwargs={"a": "1", "b": 1, "c": 1e20, "d": "true"}
        ),
        rewards=(RewardConfig(function="x", kwargs={"pattern": "~", "other": "é"}),),
        output_dir=Path("runs/7"),
    )
    assert load_config(write(tmp_path, dump_config(config)), [], "grpo") == config


def test_help_shows_every_option_with_type_text_and_default() -> None:
    text = describe_options()
    for option in list_options(RunConfig):
        assert f"--{option.dotted} " in text
        assert option.field.description
    assert "  --trainer.lr FLOAT\n        Peak learning rate. (default: 1e-06)\n" in text
    assert "--model.ref_model TEXT|null\n" in text
    assert "--rewards.N.function TEXT|null\n" in text
    assert "--model.torch_dtype float32|bfloat16\n" in text
    assert "\n\ntrainer: The Megatron-core ranks, the optimizer and its schedule." in text
    assert max(map(len, text.splitlines())) <= 110


def test_what_is_in_a_section_of_a_section_is_written_out() -> None:
    words = [
        "--model",
        "m",
        "--dataset",
        "d",
        "--teacher_model",
        "t",
        "--gkd_logits_topk",
        "4",
        "--num_engines",
        "2",
    ]
    engine = ["--teacher_backend", "engine", "--teacher.engine.num_engines", "3"]
    config = load_config(None, [*words, *engine], "gkd")
    assert (config.rollout.num_engines, config.teacher.engine.num_engines) == (2, 3)


def test_other_schemas_load_the_same_way() -> None:
    class Export(BaseModel):
        model_config = ConfigDict(extra="forbid")
        to_mcore: bool
        form: Literal["a", "b"] = "a"
        trainer: TrainerConfig = TrainerConfig()

    words = ["--to_mcore", "true", "--tensor_model_parallel_size", "2"]
    config = load_settings(Export, None, words)
    assert config == Export(to_mcore=True, trainer=TrainerConfig(tensor_model_parallel_size=2))
