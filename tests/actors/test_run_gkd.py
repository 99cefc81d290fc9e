"""GKD by its command: a student comes near its teacher, measured by transformers on the checkpoint."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.cli import main
from tests.actors import gkd_reference
from tests.actors.engine_helpers import make_model, reference_score, save_tokenizer
from tests.actors.run_helpers import Finished, evaluated, make_workspace, rows, run, start

pytestmark = pytest.mark.e2e

COMMON = (
    *("--torch_dtype", "float32", "--num_cpus", "4", "--step_timeout_s", "120", "--max_model_len", "64"),
    *("--kv_cache_memory_bytes", str(32 << 20), "--micro_batch_size", "8", "--batch_size", "16"),
    *("--max_completion_length", "10"),
)
RUNS = {
    "half": [
        *("--lmbda", "0.5", "--beta", "0", "--data_parallel_size", "2", "--tuner_type", "lora"),
        *(
            "--lora_rank",
            "16",
            "--offload_teacher",
            "--lr",
            "1e-2",
            "--max_steps",
            "30",
            "--eval_steps",
            "15",
        ),
    ],
    "written": [
        *(
            "--lmbda",
            "0",
            "--beta",
            "1",
            "--sft_alpha",
            "0.1",
            "--context_parallel_size",
            "2",
            "--lr",
            "1e-2",
        ),
        *("--max_steps", "16", "--seq_kd", "--temperature", "0.01", "--gkd_logits_topk", "30"),
        *("--teacher_backend", "engine", "--teacher.engine.num_engines", "2"),
        *("--teacher.engine.max_model_len", "64", "--teacher.engine.kv_cache_memory_bytes", str(32 << 20)),
    ],
}
# On-policy distillation as a reward, without any other.
REWARDED = (
    *("--torch_dtype", "float32", "--num_cpus", "4", "--step_timeout_s", "120", "--max_model_len", "64"),
    *("--kv_cache_memory_bytes", str(32 << 20), "--tensor_model_parallel_size", "2", "--lr", "5e-3"),
    *("--teacher_kl_coef", "1", "--num_generations", "1", "--prompts_per_step", "20", "--max_steps", "26"),
    *("--max_completion_length", "10", "--eval_temperature", "1"),
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workspace(tmp_path_factory.mktemp("gkd"))
    make_model("llama", seed=7).save_pretrained(folder / "teacher")
    save_tokenizer(folder / "teacher")
    return folder


def words(workspace: Path, name: str) -> list[str]:
    return [
        *("grpo" if name == "rewarded" else "gkd", "--model", str(workspace / "model")),
        *("--teacher_model", str(workspace / "teacher"), "--output_dir", str(workspace / name)),
        *("--dataset", str(workspace / "train.jsonl"), "--eval_dataset", str(workspace / "eval.jsonl")),
        *(REWARDED if name == "rewarded" else (*COMMON, *RUNS[name])),
    ]


@pytest.fixture(scope="module")
def runs(workspace: Path) -> dict[str, Finished]:
    finished = {name: run(*words(workspace, name)) for name in ("half", "rewarded")}
    written = start(*words(workspace, "written"))
    written.kill_an_engine(workspace / "written" / "metrics.jsonl")
    return {**finished, "written": written.finish()}


def held_out_divergence(workspace: Path, student: Path, beta: float, adapter: Path | None = None) -> float:
    """Mean over the tokens of the held-out completions, on full logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (student, workspace / "teacher")
    ]
    if adapter is not None:
        models[0] = PeftModel.from_pretrained(models[0], str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    found: list[torch.Tensor] = []
    for row in rows(workspace / "eval.jsonl"):
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        tokens = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
        with torch.no_grad():
            student_TV, teacher_TV = (model(tokens).logits[0, len(prompt) - 1 : -1] for model in models)
        found.append(gkd_reference.of_logits(student_TV, teacher_TV, beta, 1.0))
    return float(torch.cat(found).mean())


def test_adapters_bring_the_divergence_on_held_out_prompts_down_by_half(
    runs: dict[str, Finished], workspace: Path
) -> None:
    finished = runs["half"]
    assert finished.code == 0, finished.err
    assert finished.left == []
    before = held_out_divergence(workspace, workspace / "model", 0.0)
    after = held_out_divergence(
        workspace, workspace / "model", 0.0, adapter=workspace / "half" / "checkpoint"
    )
    assert after < 0.5 * before
    result = finished.result()
    assert result["divergence_before"] == pytest.approx(before, rel=1e-4)
    assert result["divergence_after"] == pytest.approx(after, rel=1e-3)


def test_steps_are_on_policy_as_often_as_asked(runs: dict[str, Finished], workspace: Path) -> None:
    assert all(finished.code == 0 for finished in runs.values()), [each.err for each in runs.values()]
    steps = [row for row in rows(workspace / "half" / "metrics.jsonl") if "loss" in row]
    assert 8 <= sum(row["on_policy"] for row in steps) <= 22
    # Engines are sent weights for these steps only, under the version of the step before.
    versions = {row["step"]: row["weight_versions"] for row in rows(workspace / "half" / "rollouts.jsonl")}
    assert versions == {row["step"]: [row["step"] - 1] * 2 for row in steps if row["on_policy"]}
    given = [row["on_policy"] for row in rows(workspace / "written" / "metrics.jsonl") if "loss" in row]
    assert given == [0.0] * 16


def test_a_teacher_in_engines_writes_completions_and_one_that_is_killed_is_replaced(
    runs: dict[str, Finished], workspace: Path
) -> None:
    from transformers import AutoModelForCausalLM

    finished, directory = runs["written"], workspace / "written"
    assert finished.code == 0, finished.err
    assert finished.left == []
    events = [row["text"] for row in rows(directory / "events.jsonl") if row["kind"] == "restart"]
    assert re.match(r"teacher engine \d is lost: .*; starting another", events[0])
    assert len(events) == 1 or "was started again" in events[1]
    # At this temperature nothing comes that is less likely than the likeliest by much.
    teacher = AutoModelForCausalLM.from_pretrained(workspace / "teacher", dtype=torch.float32)
    completions = rows(directory / "rollouts.jsonl")
    assert len(completions) == 16 * 16
    for row in completions[::25]:
        before, own = numbers(row["columns"]["prompt"]), row["token_ids"]
        with torch.no_grad():
            logits_TV = teacher(torch.tensor([[*before, *own]])).logits[0, len(before) - 1 : -1]
        assert float((logits_TV.max(dim=1).values - logits_TV[range(len(own)), own]).max()) < 0.15
    # All of them count as the dataset's would.
    for row in rows(directory / "metrics.jsonl"):
        if "loss" in row:
            assert row["loss"] == pytest.approx(row["divergence"] + 0.1 * row["cross_entropy"], rel=1e-5)
    result = finished.result()
    assert result["divergence_after"] < result["divergence_before"]


def test_a_teacher_as_a_reward_brings_the_student_near(runs: dict[str, Finished], workspace: Path) -> None:
    finished = runs["rewarded"]
    assert finished.code == 0, finished.err
    result = finished.result()
    assert result["teacher_kl_after"] < 0.5 * result["teacher_kl_before"]
    # The first number is that of the student on completions of its own, by transformers.
    assert result["teacher_kl_before"] == pytest.approx(own_reverse_kl(workspace), rel=1e-3)
    assert (workspace / "rewarded" / "curve.png").is_file()


def numbers(text: str) -> list[int]:
    """Ids of the words of a text."""
    return [int(word[1:]) for word in text.split()]


def own_reverse_kl(workspace: Path) -> float:
    """log(student / teacher), mean over the tokens of the first evaluation's completions."""
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(workspace / name, dtype=torch.float32)
        for name in ("model", "teacher")
    ]
    found: list[float] = []
    for row in evaluated(workspace / "rewarded", 0):
        before = numbers(row["columns"]["prompt"])
        tokens = [*before, *row["token_ids"]]
        ours, theirs = (reference_score(model, tokens)[len(before) - 1 :] for model in models)
        found += list(ours - theirs)
    return float(np.mean(found))


def test_another_tokenizer_is_refused(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = workspace / "other"
    shutil.copytree(workspace / "teacher", other)
    text = (other / "tokenizer.json").read_text()
    tokens = json.loads(text)
    vocabulary = tokens["model"]["vocab"]
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    assert main([*words(workspace, "half"), "--teacher_model", str(other)]) == 2
    error = capsys.readouterr().err
    assert f"the tokenizer of {other} is not the student's: 2 tokens differ" in error
    assert "'w7', which is number 7 for the student and number 8 for the teacher" in error
