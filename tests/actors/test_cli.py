"""The command before anything starts: help, plan, and every kind of wrong input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from actors.cli import main
from actors.env import PACKAGES, check_one_source
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
    assert "Upper truncation of that weight." in shown
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
    assert "trainer: 2 ranks = tensor 2 x pipeline 1 x data 1" in shown
    assert "20 prompts, 6 held out" in shown
    assert "2 x trainer: 0.5 CPU" in shown
    assert main(["plan", "--config", str(workspace / "sft.yaml")]) == 0
    assert "16 samples, 16 per step" in capsys.readouterr().out


def test_the_projects_packages_come_from_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_one_source() == ROOT
    import bridge

    monkeypatch.setattr(bridge, "__file__", "/elsewhere/bridge/__init__.py")
    with pytest.raises(Exception, match="bridge from /elsewhere"):
        check_one_source()
    assert "bridge" in PACKAGES


def fails(workspace: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", "--config", str(workspace / "grpo.yaml"), *arguments]) != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


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
    message = fails(workspace, capsys, "--trainer.pipeline_model_parallel_size", "3")
    assert "does not divide the model's 2 layers" in message


def test_wrong_models_are_named(workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no directory" in fails(workspace, capsys, "--model.model", str(tmp_path / "none"))
    assert "has no config.json" in fails(workspace, capsys, "--model.model", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    message = fails(workspace, capsys, "--model.model", str(tmp_path))
    assert "'gpt2' is not supported; supported are: deepseek_v2, " in message


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
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


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
    shutil.copytree(workspace / "model", tmp_path / "fp8")
    save_file(scaled, tmp_path / "fp8" / "model.safetensors")
    path = tmp_path / "fp8" / "config.json"
    values = json.loads(path.read_text()) | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
    }
    path.write_text(json.dumps(values))
    assert "is quantized, so its engines would be too" in fails(
        workspace, capsys, "--model.model", str(tmp_path / "fp8")
    )


def test_a_run_never_replaces_the_checkpoint_it_starts_from(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workspace / "model", workspace / "own" / "checkpoint-10")
    model = str(workspace / "own" / "checkpoint-10")
    arguments = ["--model.model", model, "--output_dir", str(workspace / "own")]
    assert main(["sft", "--config", str(workspace / "sft.yaml"), *arguments]) == 2
    assert "would replace the checkpoint that the run starts from" in capsys.readouterr().err
