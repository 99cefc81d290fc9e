"""LoRA by its commands: sft, grpo in both ways of sending, export; against peft on the transformers model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.cli import main
from tests.actors.run_helpers import Finished, make_workspace, rows, run, start

pytestmark = pytest.mark.e2e

# One stage of two has all of them.
MODULES = [
    f"layers.1.{name}"
    for name in (
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{which}_proj" for which in ("gate", "up", "down")),
    )
]
STAGES = ("--tensor_model_parallel_size", "1", "--pipeline_model_parallel_size", "2")
GRPO = ("--tuner_type", "lora", "--max_steps", "2", "--beta", "0.1", "--num_engines", "1")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("lora"), "llama")


@pytest.fixture(scope="module")
def sft(workspace: Path) -> Finished:
    """Trains adapters of rank 4 on the second of two pipeline stages."""
    return run(
        *("sft", "--config", str(workspace / "sft.yaml"), *STAGES, "--tuner_type", "lora"),
        *("--target_modules", ",".join(MODULES), "--lora_rank", "4", "--lora_dropout", "0"),
        *("--merge_lora", "true"),
        # What it trains on, so that one reference serves both losses.
        *("--eval_dataset", str(workspace / "sft.jsonl"), "--eval_steps", "2"),
    )


@pytest.fixture(scope="module")
def runs(sft: Finished, workspace: Path) -> dict[str, Finished]:
    """Two runs from that adapter that differ in layout, in what engines are sent, and in where their reference is.

    The engine that is sent the adapter alone is killed on the way.
    """
    assert sft.code == 0, sft.err
    merged = ("--vllm_enable_lora", "false", "--ref_model", str(workspace / "model"))
    merged += ("--tensor_model_parallel_size", "1")
    found: dict[str, Finished] = {}
    for name, words in (("adapter", ("--vllm_enable_lora", "true", *STAGES)), ("merged", merged)):
        running = start(
            *("grpo", "--config", str(workspace / "grpo.yaml"), "--output_dir", str(workspace / name), *GRPO),
            *("--adapters", str(workspace / "sft" / "checkpoint"), *words),
        )
        if name == "adapter":
            running.kill_an_engine(workspace / name / "metrics.jsonl")
        found[name] = running.finish()
    return found


def transformers_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def with_adapter(workspace: Path, directory: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(transformers_model(workspace / "model"), str(directory)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 45)[None]).logits


def test_sft_starts_from_transformers_loss_and_learns(sft: Finished, workspace: Path) -> None:
    from transformers import AutoTokenizer

    assert sft.code == 0, sft.err
    assert sft.left == []
    model = transformers_model(workspace / "model")
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    total, count = 0.0, 0
    for row in rows(workspace / "sft.jsonl"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        tokens = torch.tensor([prompt + completion])
        labels = torch.tensor([[-100] * len(prompt) + completion])
        with torch.no_grad():
            total += model(tokens, labels=labels).loss.item() * len(completion)
        count += len(completion)
    metrics = rows(workspace / "sft" / "metrics.jsonl")
    losses = [row["loss"] for row in metrics if "loss" in row]
    held_out = {row["step"]: row for row in metrics if "eval/loss" in row}
    assert losses[0] == pytest.approx(total / count, rel=1e-4)
    assert losses[-1] < losses[0]
    assert list(held_out) == [0, 2, 4]
    assert held_out[0]["eval/loss"] == pytest.approx(total / count, rel=1e-4)
    # The weights after two steps are those that the third one starts from.
    assert held_out[2]["eval/loss"] == pytest.approx(losses[2], rel=1e-4)
    assert held_out[0]["eval/num_tokens"] == count
    result = sft.result()
    assert result["loss_before"] == held_out[0]["eval/loss"]
    assert result["loss_best"] == min(row["eval/loss"] for row in held_out.values())


def test_the_checkpoint_is_pefts_and_the_merged_one_computes_the_same(sft: Finished, workspace: Path) -> None:
    assert sft.code == 0
    adapted = logits(with_adapter(workspace, workspace / "sft" / "checkpoint"))
    merged = logits(transformers_model(workspace / "sft" / "checkpoint-merged"))
    torch.testing.assert_close(adapted, merged, atol=2e-5, rtol=0)
    assert float((adapted - logits(transformers_model(workspace / "model"))).abs().max()) > 0.1
    config = json.loads((workspace / "sft" / "checkpoint" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 32, "LORA")
    found = load_file(workspace / "sft" / "checkpoint" / "adapter_model.safetensors")
    modules = {name.removeprefix("base_model.model.model.").split(".lora_")[0] for name in found}
    assert modules == set(MODULES)


def test_an_adapter_alone_gives_the_run_that_merged_weights_give(
    runs: dict[str, Finished], workspace: Path
) -> None:
    steps: dict[str, list[dict[str, Any]]] = {}
    for name, finished in runs.items():
        assert finished.code == 0, finished.err
        assert finished.left == []
        steps[name] = [row for row in rows(workspace / name / "metrics.jsonl") if "loss" in row]
        for row in steps[name]:
            # Engine and trainer agree on the adapted model from the first step on.
            assert row["sampling/logprob_difference_mean"] < 1e-5
    for one, other in zip(steps["adapter"], steps["merged"], strict=True):
        assert one["reward"] == pytest.approx(other["reward"])
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3)
        assert one["sync/bytes"] < other["sync/bytes"] / 10
    tensors = [load_file(workspace / name / "checkpoint" / "adapter_model.safetensors") for name in runs]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensor, tensors[1][name], atol=1e-4, rtol=1e-2)


def test_an_engine_that_replaces_a_killed_one_gets_the_adapter(
    runs: dict[str, Finished], workspace: Path
) -> None:
    """It then says the very words that the engine says that was not killed."""
    assert runs["adapter"].code == runs["merged"].code == 0
    assert re.search(r"engine 0 has version \d from the trainers", runs["adapter"].err)
    assert "has version" not in runs["merged"].err
    lost = next(row for row in rows(workspace / "adapter" / "events.jsonl") if row["kind"] == "restart")
    assert lost["text"].startswith("engine 0 is lost: ")
    assert lost["text"].endswith("; starting another")
    assert 1 <= lost["step"] <= 2
    said = [
        sorted((row["step"], row["split"], row["prompt_id"], row["completion"]) for row in rows(path))
        for path in (workspace / name / "rollouts.jsonl" for name in runs)
    ]
    assert {row[:2] for row in said[0]} == {(0, "eval"), (1, "train"), (2, "train"), (2, "eval")}
    assert said[0] == said[1]


def test_the_reference_is_the_model_without_its_adapter(runs: dict[str, Finished], workspace: Path) -> None:
    """One run takes its adapter off for it, the other has loaded the base model a second time."""
    assert runs["adapter"].code == runs["merged"].code == 0
    kl = [
        [row["kl"] for row in rows(workspace / name / "metrics.jsonl") if "kl" in row]
        for name in ("adapter", "merged")
    ]
    assert kl[0][0] > 0.01
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)


def test_export_brings_the_adapter_to_megatron_and_back(sft: Finished, workspace: Path) -> None:
    assert sft.code == 0
    adapter, model = workspace / "sft" / "checkpoint", workspace / "model"
    common = ("export", "--model", str(model), "--test_convert_precision", "true")
    there = run(
        *(
            *common,
            "--adapters",
            str(adapter),
            "--to_mcore",
            "true",
            "--output_dir",
            str(workspace / "mcore"),
        ),
        *("--tensor_model_parallel_size", "2"),
    )
    assert there.code == 0, there.err
    assert "14 of 14 tensors are the same bit for bit" in there.out
    back = ("--mcore_adapter", str(workspace / "mcore"), "--to_hf", "true", "--output_dir")
    for name, more in (("back", ()), ("whole", ("--merge_lora", "true"))):
        finished = run(*common, *back, str(workspace / name), *more)
        assert finished.code == 0, finished.err
        assert "precision test passed" in finished.out
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, workspace / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected = logits(with_adapter(workspace, adapter))
    torch.testing.assert_close(logits(transformers_model(workspace / "whole")), expected, atol=2e-5, rtol=0)


def test_wrong_adapters_are_refused_before_anything_starts(
    sft: Finished, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.code == 0
    common = ["sft", "--config", str(workspace / "sft.yaml"), "--output_dir", str(tmp_path / "out")]
    common += ["--tuner_type", "lora"]
    broken = tmp_path / "broken"
    shutil.copytree(workspace / "sft" / "checkpoint", broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    for words, message in (
        (
            ["--target_modules", "q_proj,w_proj"],
            "tuner.target_modules: no module of the model is called w_proj",
        ),
        (["--modules_to_save", "head"], "tuner.modules_to_save: no module of the model is called head"),
        (["--adapters", str(tmp_path / "none")], "tuner.adapters: there is no directory"),
        (["--adapters", str(workspace / "model")], "adapter_config.json: cannot be read"),
        (
            ["--adapters", str(broken)],
            "q_proj.lora_A.weight is [4, 64]; with this config and model it is [3, 64]",
        ),
        (["--model.model", str(broken)], "it is an adapter: give its model here, and it as --adapters"),
        (["--mcore_adapter", str(workspace / "model")], "tuner.mcore_adapter:"),
    ):
        assert main([*common, *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
