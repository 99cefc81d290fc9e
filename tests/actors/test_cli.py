"""The command before anything starts: help, plan, and every kind of wrong input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV3Config

from actors.cli import main
from actors.env import PACKAGES, check_one_source
from configs.errors import BasculeError
from configs.export import ExportConfig, InferConfig
from configs.options import list_options
from configs.schema import RunConfig
from tests.actors.run_helpers import ROOT, make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("cli"))


def test_help_lists_every_option_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["grpo", "--help"])
    shown = capsys.readouterr().out
    for option in list_options(RunConfig):
        assert f"--{'.'.join(option.path)}" in shown
    assert "Upper bound of the ratio." in shown
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "make-model" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "schema"), [("export", ExportConfig), ("infer", InferConfig)])
def test_help_of_the_other_commands_lists_their_options(
    command: str, schema: type[BaseModel], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for option in list_options(schema):
        assert f"--{option.dotted}" in shown
    assert "--grpo." not in shown


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_of_an_export_is_the_precision_tests(
    passed: bool, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors import export

    asked: list[ExportConfig] = []

    def fake(config: ExportConfig, console: object) -> dict[str, object]:
        asked.append(config)
        return {"passed": passed}

    monkeypatch.setattr(export, "export", fake)
    words = ["--model", "m", "--to_mcore", "true", "--output_dir", "o", "--tensor_model_parallel_size", "2"]
    assert main(["export", *words]) == code
    assert asked[0].layout.tensor_model_parallel_size == 2
    assert f'"passed": {str(passed).lower()}' in capsys.readouterr().out
    assert main(["export", *words, "--to_hf", "true"]) == 2
    assert "exactly one of --to_mcore true" in capsys.readouterr().err


def test_plan_prints_the_resolved_config_and_what_would_start(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config", str(workspace / "grpo.yaml"), "--num_generations", "2"]) == 0
    shown = capsys.readouterr().out
    assert "num_generations: 2" in shown
    assert "trainer: 2 ranks = tensor 2 x pipeline 1 x context 1 x data 1" in shown
    assert "20 prompts, 6 held out" in shown
    assert "2 x trainer: 0.5 CPU" in shown
    assert main(["plan", "--config", str(workspace / "sft.yaml")]) == 0
    assert "data: 16 samples, 16 per step, 4 steps" in capsys.readouterr().out
    epochs = ("--max_steps", "100", "--num_train_epochs", "5", "--sft.batch_size", "8", "--freeze", "*norm*")
    lengths = ("--sft.max_length", "8", "--truncation", "truncate", "--split_dataset_ratio", "0.25")
    assert main(["plan", "--config", str(workspace / "sft.yaml"), *epochs, *lengths]) == 0
    shown = capsys.readouterr().out
    assert "data: 12 samples, 12 truncated, 8 per step, 8 steps" in shown
    assert "max_steps: 8" in shown
    assert "held out: 4 samples" in shown
    assert "trained: all parameters but *norm*" in shown
    message = refused(capsys, "plan", "--config", str(workspace / "sft.yaml"), "--freeze", "*.q_proj.weight")
    assert "k_proj.weight, model.layers.0.self_attn.v_proj.weight is not, and Megatron keeps them" in message


def test_a_head_without_a_gpu_plans_a_run_on_gpus_of_its_cluster_and_no_other(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ("plan", "--config", str(workspace / "grpo.yaml"), "--model.device", "cuda")
    assert "torch finds no GPU" in refused(capsys, *words)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert main(words) == 0
    assert "2 x trainer: 0.5 CPU, 1 GPU" in capsys.readouterr().out


def test_the_projects_packages_come_from_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_one_source() == ROOT
    import bridge

    monkeypatch.setattr(bridge, "__file__", "/elsewhere/bridge/__init__.py")
    with pytest.raises(Exception, match="bridge from /elsewhere"):
        check_one_source()
    assert "bridge" in PACKAGES


def fails(workspace: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return refused(capsys, "plan", "--config", str(workspace / "grpo.yaml"), *arguments)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command whose input is wrong."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def copy_of_model(workspace: Path, path: Path, **config: Any) -> Path:
    """The workspace's model with other values in config.json."""
    shutil.copytree(workspace / "model", path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | config))
    return path


def make_torch_dist(path: Path, *, beside: Path | None) -> Path:
    """What is asked of a torch_dist directory before a rank reads it; config and tokenizer come from `beside`."""
    (path / "iter_0000001").mkdir(parents=True)
    (path / "latest_checkpointed_iteration.txt").write_text("1\n")
    (path / "iter_0000001" / "metadata.json").write_text("{}")
    for file in [] if beside is None else beside.glob("*.json"):
        shutil.copy(file, path)
    return path


def test_wrong_options_are_refused_with_the_nearest_name(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "tensor_model_parallel_size" in fails(workspace, capsys, "--tensor_model_paralel_size", "2")
    assert "min_lr: 1.0 is above" in fails(workspace, capsys, "--min_lr", "1.0")
    assert "num_generations" in fails(workspace, capsys, "--max_num_seqs", "1")


def test_a_layout_that_does_not_divide_names_what(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(workspace, capsys, "--trainer.tensor_model_parallel_size", "3")
    assert "does not divide the model's 4 attention heads" in message
    message = fails(workspace, capsys, "--moe_aux_loss_coeff", "0.01")
    assert "trainer.moe_aux_loss_coeff" in message
    assert "has no experts" in message
    message = fails(workspace, capsys, "--trainer.pipeline_model_parallel_size", "3")
    assert "does not divide the model's 2 layers" in message


def test_wrong_models_are_named(workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no directory" in fails(workspace, capsys, "--model.model", str(tmp_path / "none"))
    assert "has no config.json" in fails(workspace, capsys, "--model.model", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    message = fails(workspace, capsys, "--model.model", str(tmp_path))
    assert message.startswith(
        f"error: {tmp_path / 'config.json'}: model_type 'gpt2' is not supported; supported"
    )
    assert "device is cuda, but torch finds no GPU" in fails(workspace, capsys, "--model.device", "cuda")


def test_directories_of_the_other_kind_say_which_option_is_theirs(
    workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hf, mcore = str(workspace / "model"), str(make_torch_dist(tmp_path / "mcore", beside=workspace / "model"))
    bare, none = str(make_torch_dist(tmp_path / "bare", beside=None)), str(tmp_path / "none")
    given = ("--model.model", "null", "--model.mcore_model")
    message = fails(workspace, capsys, *given, none)
    assert f"model.mcore_model: {none} is not a Megatron checkpoint" in message
    assert "there is no such directory" in message
    assert "its weights are safetensors: give it as --model.model" in fails(workspace, capsys, *given, hf)
    message = fails(workspace, capsys, *given, bare)
    assert f"model.mcore_model: {bare} has no config.json; give the directory that has it" in message
    assert "torch_dist checkpoint; give it as --model.mcore_model" in fails(
        workspace, capsys, "--model.model", mcore
    )
    assert f"model.mcore_ref_model: {none} is not" in fails(
        workspace, capsys, "--grpo.beta", "0.1", "--model.mcore_ref_model", none
    )
    export = ("export", "--output_dir", str(tmp_path / "out"))
    assert "give it as --mcore_model" in refused(capsys, *export, "--to_mcore", "true", "--model", mcore)
    assert f"mcore_model: {none} is not" in refused(capsys, *export, "--to_hf", "true", "--mcore_model", none)
    assert f"bascule export --mcore_model {mcore} --to_hf true" in refused(
        capsys, "infer", "--model", mcore, "--prompt", "w3"
    )


def test_damaged_weights_are_found_before_anything_starts(
    workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = copy_of_model(workspace, tmp_path / "cut") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    commands = (
        ("plan", "--config", str(workspace / "grpo.yaml"), "--model.model"),
        ("plan", "--config", str(workspace / "grpo.yaml"), "--grpo.beta", "1", "--model.ref_model"),
        ("export", "--to_mcore", "true", "--output_dir", str(tmp_path / "out"), "--model"),
        ("infer", "--prompt", "w3", "--model"),
        ("infer", "--prompt", "w3", "--backend", "transformers", "--model"),
    )
    for command in commands:
        message = refused(capsys, *command, str(path.parent))
        assert f"{path}: truncated: model.norm.weight ends at byte" in message


def test_weights_that_are_not_those_of_config_json_are_all_named(
    workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    larger = copy_of_model(
        workspace, tmp_path / "larger", intermediate_size=160, num_hidden_layers=4, layer_types=None
    )
    for command in (
        ("plan", "--config", str(workspace / "grpo.yaml"), "--model.model"),
        ("plan", "--config", str(workspace / "sft.yaml"), "--model.model"),
        ("plan", "--config", str(workspace / "grpo.yaml"), "--grpo.beta", "1", "--model.ref_model"),
        ("export", "--to_mcore", "true", "--output_dir", str(tmp_path / "out"), "--model"),
    ):
        message = refused(capsys, *command, str(larger))
        assert message.startswith(f"error: {larger}: the checkpoint does not fit the model of config.json:\n")
        assert (
            "model.layers.1.mlp.down_proj.weight is [64, 128] in the checkpoint, the model needs" in message
        )
        assert "the checkpoint does not have model.layers.3.input_layernorm.weight" in message
    smaller = str(copy_of_model(workspace, tmp_path / "smaller", num_hidden_layers=1, layer_types=None))
    message = fails(workspace, capsys, "--model.model", smaller)
    assert message.startswith(
        f"error: {smaller}: no rule reads these tensors of the checkpoint: model.layers.1."
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0", "is 0; should be greater than or equal to 1"),
        ("-1", "is -1; should be greater than or equal to 1"),
        ("abc", "is 'abc'; should be a valid integer"),
        ("null", "is None; should be a valid integer"),
        ("[1]", "is [1]; should be a valid integer"),
    ],
)
def test_sizes_of_a_plan_that_are_none_are_named(
    workspace: Path, capsys: pytest.CaptureFixture[str], value: str, words: str
) -> None:
    plan = ("plan", "--model", str(workspace / "model"), "--world", "4")
    message = refused(capsys, *plan, "--tensor_model_parallel_size", value)
    assert message.startswith(f"error: command line: --layout.tensor_model_parallel_size {words}")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("gone.py:f", "gone.py"),
        ("{rewards}:low_word", "low_words"),
        ("{rewards}:asks", "colour"),
        ("exact", "exact_match"),
    ],
)
def test_wrong_rewards_are_named(
    workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, function: str, words: str
) -> None:
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def low_words(completion): ...\ndef asks(completion, colour): ...\n")
    message = fails(workspace, capsys, "--rewards.0.function", function.format(rewards=rewards))
    assert words in message


def test_wrong_data_is_named(workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty" in fails(workspace, capsys, "--data.dataset", str(empty))
    assert "gone.jsonl" in fails(workspace, capsys, "--data.dataset", str(tmp_path / "gone.jsonl"))


def test_a_directory_with_a_run_is_not_overwritten_unasked(
    workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    arguments = ["grpo", "--config", str(workspace / "grpo.yaml"), "--output_dir", str(tmp_path)]
    assert main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err
    shutil.copytree(workspace / "model", tmp_path / "checkpoint")
    assert main([*arguments, "--exist_ok", "--model.model", str(tmp_path / "checkpoint")]) == 2
    assert "would replace the checkpoint that the run starts from" in capsys.readouterr().err
    assert main([*arguments, "--exist_ok", "--save_safetensors", "false"]) == 2
    assert "checkpoint holds safetensors of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("metrics", [None, "", '{"step": 0, "eval/accuracy": 0.5}\n'])
def test_what_a_run_left_that_failed_before_its_first_step_is_in_nobodys_way(
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    metrics: str | None,
) -> None:
    from actors import run

    def connect(config: object) -> object:
        raise BasculeError("it would start now")

    monkeypatch.setattr(run, "connect", connect)
    arguments = ["sft", "--config", str(workspace / "sft.yaml"), "--output_dir", str(tmp_path)]
    (tmp_path / "config.yaml").write_text("")
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    assert main(arguments) == 1
    assert "it would start now" in capsys.readouterr().err
    (tmp_path / "checkpoint-1").mkdir()
    assert main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_models_whose_engines_could_not_follow_are_refused_for_grpo(
    workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from transformers import GptOssConfig

    GptOssConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    assert "model_type gpt_oss cannot be trained by grpo" in fails(
        workspace, capsys, "--model.model", str(tmp_path)
    )
    scaled = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1),
    }
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = copy_of_model(workspace, tmp_path / "fp8", quantization_config=quantization)
    save_file(scaled, path / "model.safetensors")
    assert "is quantized, so its engines would be too" in fails(workspace, capsys, "--model.model", str(path))
    mcore = make_torch_dist(tmp_path / "mcore", beside=path)
    assert f"{mcore / 'config.json'}: quantization_config would make the engines quantized" in fails(
        workspace, capsys, "--model.model", "null", "--model.mcore_model", str(mcore)
    )
    message = fails(workspace, capsys, "--rollout.tensor_parallel_size", "3")
    assert "rollout.tensor_parallel_size: 3 does not divide the model's 4 attention heads" in message


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (DeepseekV3Config, {}, 'add "topk_method": "noaux_tc", "scoring_func": "sigmoid"'),
        (
            DeepseekV3Config,
            {"topk_method": "noaux_tc"},
            'without these keys; add "scoring_func": "sigmoid"',
        ),
        (
            DeepseekV2Config,
            {"n_group": 8, "topk_group": 3, "num_experts_per_tok": 6},
            "n_group is 8 with topk_method greedy",
        ),
    ],
)
def test_experts_that_vllm_would_choose_otherwise_are_refused(
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    kind: Any,
    values: dict[str, Any],
    words: str,
) -> None:
    shutil.copytree(workspace / "model", tmp_path, dirs_exist_ok=True)
    kind(**values).save_pretrained(tmp_path)
    message = fails(workspace, capsys, "--model.model", str(tmp_path))
    assert f"{tmp_path / 'config.json'}: " in message
    assert words in message
    assert words in refused(capsys, "infer", "--model", str(tmp_path), "--prompt", "w3")


def test_a_run_never_replaces_the_checkpoint_it_starts_from(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workspace / "model", workspace / "own" / "checkpoint-10")
    model = str(workspace / "own" / "checkpoint-10")
    arguments = ["--model.model", model, "--output_dir", str(workspace / "own")]
    assert main(["sft", "--config", str(workspace / "sft.yaml"), *arguments]) == 2
    assert "would replace the checkpoint that the run starts from" in capsys.readouterr().err
