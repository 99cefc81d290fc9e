"""A model that sees, by its commands: sft on pictures and export, against transformers' model and processor."""

import json
import shutil
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
from tests.actors.run_helpers import ROOT, Finished, assert_same_weights, rows, run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    assert main(["make-model", "tiny-vl", "--output_dir", str(folder)]) == 0
    lines = (folder / "data" / "eval.jsonl").read_text().splitlines(keepends=True)
    images = [json.loads(line)["messages"][0]["content"][0]["image"] for line in lines[:4]]
    question = [{"type": "video", "video": images, "fps": 2}, {"type": "text", "text": "number"}]
    row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "31"}]}
    (folder / "few.jsonl").write_text("".join([*lines[:7], json.dumps(row) + "\n"]))
    return folder


def sft(workspace: Path, name: str, *words: str) -> Finished:
    """A run of two steps, with a state after each, in the folder `name`."""
    return run(
        *("sft", "--config", str(ROOT / "configs" / "sft-tiny-vl.yaml"), "--model", str(workspace / "base")),
        *("--dataset", str(workspace / "data" / "sft.jsonl"), "--eval_dataset", str(workspace / "few.jsonl")),
        *("--output_dir", str(workspace / name), "--max_steps", "2", "--lr_warmup_iters", "0"),
        *("--eval_steps", "0", "--vit_lr", "1e-4", "--num_cpus", "4", "--max_length", "64"),
        *("--resume_steps", "1", *words),
    )


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Finished:
    return sft(workspace, "sft")


def held_out_loss(model_dir: Path, path: Path, adapter: Path | None = None) -> tuple[float, int]:
    """Mean over the tokens of the answers, and how many there are; with PEFT's adapter on the model."""
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    processor = Qwen2VLImageProcessorPil.from_pretrained(model_dir)
    config = AutoConfig.from_pretrained(model_dir)
    total, count = 0.0, 0
    for row in rows(path):
        entry = row["messages"][0]["content"][0]
        shown, seen = (image if entry["type"] == "image" else video)(processor, entry)
        texts = [
            tokenizer.apply_chat_template(
                row["messages"][:end], tokenize=False, add_generation_prompt=end == 1
            ).replace(IMAGE if entry["type"] == "image" else VIDEO, shown)
            for end in (1, 2)
        ]
        prompt, whole = (tokenizer(text)["input_ids"] for text in texts)
        tokens = torch.tensor([whole])
        labels = torch.where(torch.arange(len(whole)) < len(prompt), -100, tokens)
        kinds = (tokens == config.image_token_id).int() + 2 * (tokens == config.video_token_id).int()
        with torch.no_grad():
            loss = model(input_ids=tokens, labels=labels, mm_token_type_ids=kinds, **seen).loss
        total += float(loss) * (len(whole) - len(prompt))
        count += len(whole) - len(prompt)
    return total / count, count


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


def test_adapters_of_all_parts_are_pefts(workspace: Path) -> None:
    finished = sft(workspace, "lora", "--tuner_type", "lora", "--data_parallel_size", "1")
    assert finished.code == 0, finished.err
    found = {row["step"]: row for row in rows(workspace / "lora" / "metrics.jsonl") if "eval/loss" in row}
    adapter = workspace / "lora" / "checkpoint"
    after, _ = held_out_loss(workspace / "base", workspace / "few.jsonl", adapter)
    assert found[2]["eval/loss"] == pytest.approx(after, rel=1e-5)
    assert after < found[0]["eval/loss"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = {
        name.rpartition(".lora_")[0]
        for name, tensor in tensors.items()
        if ".lora_B." in name and tensor.any()
    }
    for part in ("visual.blocks.0.attn.proj", "visual.merger.linear_fc1", "layers.1.mlp.down_proj"):
        assert any(module.endswith(part) for module in modules)


def test_it_goes_on_after_a_kill_bitwise(trained: Finished, workspace: Path) -> None:
    """What a SIGKILL after the first of two steps leaves."""
    assert trained.code == 0, trained.err
    whole, cut = workspace / "sft", workspace / "cut"
    later = shutil.ignore_patterns("step-2", "checkpoint", "result.json")
    shutil.copytree(whole, cut, symlinks=True, ignore=later)
    finished = sft(workspace, "cut")
    assert finished.code == 0, finished.err
    assert "goes on after step 1" in finished.out
    assert_same_weights(*(each / "checkpoint" / "model.safetensors" for each in (whole, cut)))


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
