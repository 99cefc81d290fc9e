"""A model that sees, by its commands: sft, grpo and gkd on pictures, export, against transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from actors.cli import main
from actors.tiny_vision import IMAGE, START, STOP, VIDEO
from tests.actors.run_helpers import ROOT, Finished, rows, run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    assert main(["make-model", "tiny-vl", "--output_dir", str(folder)]) == 0
    lines = (folder / "data" / "eval.jsonl").read_text().splitlines(keepends=True)
    images = [json.loads(line)["prompt"][0]["content"][0]["image"] for line in lines[:4]]
    question = [{"type": "video", "video": images, "fps": 2}, {"type": "text", "text": "number"}]
    row = {"prompt": [{"role": "user", "content": question}], "completion": "31"}
    (folder / "few.jsonl").write_text("".join(lines[:8]))
    (folder / "mixed.jsonl").write_text("".join([*lines[:7], json.dumps(row) + "\n"]))
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
        *("--dataset", str(workspace / "data" / "train.jsonl")),
        *("--eval_dataset", str(workspace / "mixed.jsonl"), "--eval_steps", "0"),
        *("--output_dir", str(workspace / "sft"), "--max_steps", "2", "--lr_warmup_iters", "0"),
        *("--vit_lr", "1e-4", "--num_cpus", "4", "--max_length", "64"),
    )


@pytest.fixture(scope="module")
def rewarded(trained: Finished, workspace: Path) -> Finished:
    """Two steps of grpo that train the language model, and a greedy evaluation under the last weights."""
    assert trained.code == 0, trained.err
    return run(
        *("grpo", "--config", str(ROOT / "configs" / "grpo-tiny-vl.yaml")),
        *("--model", str(workspace / "sft" / "checkpoint"), "--output_dir", str(workspace / "grpo")),
        *("--dataset", str(workspace / "data" / "train.jsonl")),
        *("--eval_dataset", str(workspace / "few.jsonl"), "--eval_size", "8", "--max_steps", "2"),
        *("--prompts_per_step", "8", "--lr", "1e-2", "--lr_warmup_iters", "0", "--eval_steps", "0"),
        *("--filter_zero_variance", "false", "--freeze_vit", "true", "--freeze_aligner", "true"),
        *("--check_logprobs_every", "1", "--tensor_model_parallel_size", "2", "--num_cpus", "4"),
        *("--max_lag", "1", "--rewards.0.function", str(workspace / "reward.py") + ":spread"),
    )


@pytest.fixture(scope="module")
def taught(rewarded: Finished, workspace: Path) -> Finished:
    """A step of gkd on the student's own answers to pictures, with the teacher in the trainer rank.

    Adapters of all parts are trained, the tower's too.
    """
    return run(
        *("gkd", "--config", str(ROOT / "configs" / "gkd-tiny.yaml"), "--output_dir", str(workspace / "gkd")),
        *("--model", str(workspace / "base"), "--teacher_model", str(workspace / "sft" / "checkpoint")),
        *("--dataset", str(workspace / "data" / "train.jsonl")),
        *("--eval_dataset", str(workspace / "few.jsonl")),
        *("--max_steps", "1", "--gkd.batch_size", "8", "--eval_steps", "0", "--num_cpus", "4"),
        *("--tensor_model_parallel_size", "1", "--tuner_type", "lora", "--lora_rank", "4"),
        *("--freeze_vit", "false", "--freeze_aligner", "false", "--lr", "1e-2", "--lr_warmup_iters", "0"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A row as transformers takes it: tokens of the prompt, of all of it, and the picture."""

    prompt: list[int]
    whole: list[int]
    picture: Any
    config: Any

    def logits(self, model: Any, tokens: list[int]) -> torch.Tensor:
        """Logits [T, V] of tokens that begin with the prompt's."""
        row = torch.tensor([tokens])
        with torch.no_grad():
            kinds = (row == self.config.image_token_id).int() + 2 * (row == self.config.video_token_id).int()
            return model(input_ids=row, mm_token_type_ids=kinds, **self.picture).logits[0]


def load(model_dir: Path) -> Any:
    return Qwen3VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()


def seen(model_dir: Path, path: Path) -> list[Seen]:
    """All rows of a file."""
    tokenizer, config = AutoTokenizer.from_pretrained(model_dir), AutoConfig.from_pretrained(model_dir)
    processor = Qwen2VLImageProcessorPil.from_pretrained(model_dir)
    found: list[Seen] = []
    for row in rows(path):
        entry = row["prompt"][0]["content"][0]
        shown, picture = (image if entry["type"] == "image" else video)(processor, entry)
        messages = [*row["prompt"], {"role": "assistant", "content": row["completion"]}]
        texts = [
            tokenizer.apply_chat_template(
                messages[:end], tokenize=False, add_generation_prompt=end == 1
            ).replace(IMAGE if entry["type"] == "image" else VIDEO, shown)
            for end in (1, 2)
        ]
        prompt, whole = (tokenizer(text)["input_ids"] for text in texts)
        found.append(Seen(prompt=prompt, whole=whole, picture=picture, config=config))
    return found


def image(processor: Any, entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What stands for a picture in the text, and what the model takes."""
    seen = processor(Image.open(entry["image"]), return_tensors="pt")
    return IMAGE * (int(seen["image_grid_thw"].prod()) // 4), dict(seen)


def video(processor: Any, entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The same of four frames, of which two are a step; they are 0.5 seconds apart."""
    seen = processor([Image.open(path) for path in entry["video"]], return_tensors="pt")
    frames = seen["pixel_values"].view(4, 24, 3, 2, 64)[:, :, :, 0]
    pairs = torch.stack([frames[0::2], frames[1::2]], dim=3)
    inputs = {"pixel_values_videos": pairs.reshape(48, -1), "video_grid_thw": torch.tensor([[2, 4, 6]])}
    step = f"{START}{VIDEO * 6}{STOP}"
    return f"<0.2 seconds>{step}<1.2 seconds>{step}", inputs


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


def test_held_out_losses_are_transformers_before_and_after(trained: Finished, workspace: Path) -> None:
    assert trained.code == 0, trained.err
    assert trained.left == []
    found = {row["step"]: row for row in rows(workspace / "sft" / "metrics.jsonl") if "eval/loss" in row}
    before, count = held_out_loss(workspace / "base", workspace / "mixed.jsonl")
    after, _ = held_out_loss(workspace / "sft" / "checkpoint", workspace / "mixed.jsonl")
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


def divergence(workspace: Path, adapter: Path | None = None) -> float:
    """Forward, of the whole vocabulary, mean over the held-out answers' tokens; with PEFT's adapter."""
    student, teacher = load(workspace / "base"), load(workspace / "sft" / "checkpoint")
    if adapter is not None:
        student = peft.PeftModel.from_pretrained(student, adapter).eval()
    total, count = 0.0, 0
    for row in seen(workspace / "base", workspace / "few.jsonl"):
        ours, theirs = answer_logprobs(row, student), answer_logprobs(row, teacher)
        total += float((theirs.exp() * (theirs - ours)).sum())
        count += len(ours)
    return total / count


def test_a_teacher_that_sees_teaches_by_its_whole_distribution(taught: Finished, workspace: Path) -> None:
    assert taught.code == 0, taught.err
    adapter = workspace / "gkd" / "checkpoint"
    found = [
        row["eval/divergence"]
        for row in rows(workspace / "gkd" / "metrics.jsonl")
        if "eval/divergence" in row
    ]
    assert found == pytest.approx([divergence(workspace), divergence(workspace, adapter)], rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=1e-2)
    tensors = load_file(adapter / "adapter_model.safetensors")
    moved = {
        name.rpartition(".lora_")[0] for name, tensor in tensors.items() if "lora_B" in name and tensor.any()
    }
    for part in ("visual.blocks.0.attn.proj", "visual.merger.linear_fc1", "layers.1.mlp.down_proj"):
        assert any(module.endswith(part) for module in moved)
    sampled = rows(workspace / "gkd" / "rollouts.jsonl")
    assert len(sampled) == 8
    assert all(row["tokens"] for row in sampled)
