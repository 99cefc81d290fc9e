"""A model that sees, by its commands: sft, grpo and gkd on pictures, export, against transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from actors.cli import main
from tests.actors.run_helpers import ROOT, Finished, rows, run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    assert main(["make-model", "tiny-vl", "--output_dir", str(folder)]) == 0
    lines = (folder / "data" / "eval.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:8]))
    # Completions of one prompt get different rewards, whatever they are.
    (folder / "reward.py").write_text(
        "def spread(completions, completion_ids, **_):\n"
        "    return [float(sum(ids) % 5) for ids in completion_ids]\n"
    )
    return folder


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Finished:
    return run(
        *("sft", "--config", str(ROOT / "configs" / "sft-tiny-vl.yaml"), "--model", str(workspace / "base")),
        *(
            "--dataset",
            str(workspace / "data" / "train.jsonl"),
            "--eval_dataset",
            str(workspace / "few.jsonl"),
        ),
        *("--output_dir", str(workspace / "sft"), "--max_steps", "2", "--lr_warmup_iters", "0"),
        *("--eval_steps", "0", "--vit_lr", "1e-4", "--num_cpus", "4"),
    )


@pytest.fixture(scope="module")
def rewarded(trained: Finished, workspace: Path) -> Finished:
    """Two steps of grpo that train the language model, and a greedy evaluation under the last weights."""
    assert trained.code == 0, trained.err
    return run(
        *(
            "grpo",
            "--config",
            str(ROOT / "configs" / "grpo-tiny-vl.yaml"),
            "--output_dir",
            str(workspace / "grpo"),
        ),
        *(
            "--model",
            str(workspace / "sft" / "checkpoint"),
            "--dataset",
            str(workspace / "data" / "train.jsonl"),
        ),
        *("--eval_dataset", str(workspace / "few.jsonl"), "--eval_size", "8", "--max_steps", "2"),
        *("--prompts_per_step", "8", "--lr", "1e-2", "--lr_warmup_iters", "0", "--eval_steps", "0"),
        *("--filter_zero_variance", "false", "--freeze_vit", "true", "--freeze_aligner", "true"),
        *("--check_logprobs_every", "1", "--tensor_model_parallel_size", "2", "--num_cpus", "4"),
        *("--max_lag", "1", "--rewards.0.function", str(workspace / "reward.py") + ":spread"),
    )


@pytest.fixture(scope="module")
def taught(rewarded: Finished, workspace: Path) -> Finished:
    """A step of gkd on the student's own answers to pictures, with the teacher in the trainer rank."""
    return run(
        *("gkd", "--config", str(ROOT / "configs" / "gkd-tiny.yaml"), "--output_dir", str(workspace / "gkd")),
        *("--model", str(workspace / "base"), "--teacher_model", str(workspace / "sft" / "checkpoint")),
        *(
            "--dataset",
            str(workspace / "data" / "train.jsonl"),
            "--eval_dataset",
            str(workspace / "few.jsonl"),
        ),
        *("--max_steps", "1", "--gkd.batch_size", "8", "--eval_steps", "0", "--num_cpus", "4"),
        *("--tensor_model_parallel_size", "1", "--tuner_type", "lora", "--lora_rank", "4"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A row as transformers takes it: tokens of the prompt, of all of it, and the picture."""

    prompt: list[int]
    whole: list[int]
    picture: Any
    image_token: int

    def logits(self, model: Any, tokens: list[int]) -> torch.Tensor:
        """Logits [T, V] of tokens that begin with the prompt's."""
        row = torch.tensor([tokens])
        with torch.no_grad():
            types = (row == self.image_token).int()
            return model(input_ids=row, mm_token_type_ids=types, **self.picture).logits[0]


def load(model_dir: Path) -> Any:
    return Qwen3VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()


def seen(model_dir: Path, path: Path) -> list[Seen]:
    """All rows of a file."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    processor = Qwen2VLImageProcessorPil.from_pretrained(model_dir)
    image_token = AutoConfig.from_pretrained(model_dir).image_token_id
    found: list[Seen] = []
    for row in rows(path):
        picture = processor(Image.open(row["prompt"][0]["content"][0]["image"]), return_tensors="pt")
        features = int(picture["image_grid_thw"].prod()) // processor.merge_size**2
        messages = [*row["prompt"], {"role": "assistant", "content": row["completion"]}]
        prompt, whole = (encoded(tokenizer, messages[:end], features, image_token) for end in (1, 2))
        found.append(Seen(prompt=prompt, whole=whole, picture=picture, image_token=image_token))
    return found


def answer_logprobs(row: Seen, model: Any) -> torch.Tensor:
    """Of the whole vocabulary at each token of the answer, [A, V]."""
    return torch.log_softmax(row.logits(model, row.whole)[len(row.prompt) - 1 : -1], -1)


def held_out_loss(model_dir: Path, path: Path) -> tuple[float, int]:
    """Mean over the tokens of the answers, and how many there are."""
    model, total, count = load(model_dir), 0.0, 0
    for row in seen(model_dir, path):
        labels = torch.tensor(row.whole[len(row.prompt) :])
        total -= float(answer_logprobs(row, model).gather(1, labels[:, None]).sum())
        count += len(labels)
    return total / count, count


def encoded(tokenizer: Any, messages: list[Any], features: int, image_token: int) -> list[int]:
    """A prompt, or a conversation up to the end of its answer, with a token for each of the picture's features."""
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=len(messages) == 1
    )
    place = found.index(image_token)
    return [*found[:place], *[image_token] * features, *found[place + 1 :]]


def test_held_out_losses_are_transformers_before_and_after(trained: Finished, workspace: Path) -> None:
    assert trained.code == 0, trained.err
    assert trained.left == []
    found = {row["step"]: row for row in rows(workspace / "sft" / "metrics.jsonl") if "eval/loss" in row}
    before, count = held_out_loss(workspace / "base", workspace / "few.jsonl")
    after, _ = held_out_loss(workspace / "sft" / "checkpoint", workspace / "few.jsonl")
    assert found[0]["eval/num_tokens"] == count
    assert found[0]["eval/loss"] == pytest.approx(before, rel=1e-5)
    assert found[2]["eval/loss"] == pytest.approx(after, rel=1e-5)
    assert after < before


def test_the_checkpoint_passes_the_precision_test_on_its_way_to_megatron(
    trained: Finished, workspace: Path
) -> None:
    assert trained.code == 0
    finished = run(
        *("export", "--model", str(workspace / "sft" / "checkpoint"), "--to_mcore", "true"),
        *("--output_dir", str(workspace / "mcore"), "--tensor_model_parallel_size", "2"),
        *("--test_convert_precision", "true"),
    )
    assert finished.code == 0, finished.err + finished.out
    assert "precision test passed" in finished.out
    assert "token_diff (with loss): 0 of" in finished.out


def test_engines_sample_as_the_checkpoint_that_is_saved(rewarded: Finished, workspace: Path) -> None:
    assert rewarded.code == 0, rewarded.err
    assert rewarded.left == []
    steps = [row for row in rows(workspace / "grpo" / "metrics.jsonl") if "reward" in row]
    assert all(row["grad_norm"] > 0.01 for row in steps)
    assert all(row["sync/logprob_difference_max"] < 1e-4 for row in steps)
    model, file = load(workspace / "grpo" / "checkpoint"), workspace / "few.jsonl"
    pictures = seen(workspace / "grpo" / "checkpoint", file)
    shown = {json.dumps(row["prompt"]): picture for row, picture in zip(rows(file), pictures, strict=True)}
    last = [row for row in rows(workspace / "grpo" / "rollouts.jsonl") if row["split"] == "eval"][-8:]
    assert {row["weight_versions"][0] for row in last} == {2}
    for row in last:
        picture, found = shown[json.dumps(row["messages"])], row["token_ids"]
        logits = picture.logits(model, [*picture.prompt, *found])
        assert logits[len(picture.prompt) - 1 : -1].argmax(-1).tolist() == found


def test_a_tower_that_is_not_trained_is_sent_once(rewarded: Finished, workspace: Path) -> None:
    assert rewarded.code == 0, rewarded.err
    before, after = (load(workspace / run / "checkpoint").state_dict() for run in ("sft", "grpo"))
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert {name for name in before if ".visual." in name} <= same
    language = sum(tensor.nbytes for name, tensor in before.items() if ".visual." not in name)
    # The embedding is tied: it is there under two names, and sent under one.
    language -= before["lm_head.weight"].nbytes
    steps = [row for row in rows(workspace / "grpo" / "metrics.jsonl") if "reward" in row]
    for row in steps:
        assert language <= row["sync/bytes"] < language * 1.05


def test_a_teacher_that_sees_teaches_by_its_whole_distribution(taught: Finished, workspace: Path) -> None:
    assert taught.code == 0, taught.err
    before = next(row for row in rows(workspace / "gkd" / "metrics.jsonl") if "eval/divergence" in row)
    student, teacher = load(workspace / "base"), load(workspace / "sft" / "checkpoint")
    total, count = 0.0, 0
    for row in seen(workspace / "base", workspace / "few.jsonl"):
        ours, theirs = answer_logprobs(row, student), answer_logprobs(row, teacher)
        total += float((theirs.exp() * (theirs - ours)).sum())
        count += len(ours)
    assert before["eval/divergence"] == pytest.approx(total / count, rel=1e-4)
    sampled = rows(workspace / "gkd" / "rollouts.jsonl")
    assert len(sampled) == 8
    assert all(row["tokens"] for row in sampled)
