"""A model that sees, by its commands: sft on pictures and export, against transformers' model and processor."""

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


def held_out_loss(model_dir: Path, path: Path) -> tuple[float, int]:
    """Mean over the tokens of the answers, and how many there are."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    processor = Qwen2VLImageProcessorPil.from_pretrained(model_dir)
    config = AutoConfig.from_pretrained(model_dir)
    total, count = 0.0, 0
    for row in rows(path):
        seen = processor(Image.open(row["prompt"][0]["content"][0]["image"]), return_tensors="pt")
        features = int(seen["image_grid_thw"].prod()) // processor.merge_size**2
        messages = [*row["prompt"], {"role": "assistant", "content": row["completion"]}]
        prompt, whole = (
            encoded(tokenizer, messages[:end], features, config.image_token_id) for end in (1, 2)
        )
        tokens = torch.tensor([whole])
        labels = torch.where(torch.arange(len(whole)) < len(prompt), -100, tokens)
        with torch.no_grad():
            loss = model(
                input_ids=tokens,
                labels=labels,
                mm_token_type_ids=(tokens == config.image_token_id).int(),
                **seen,
            ).loss
        total += float(loss) * (len(whole) - len(prompt))
        count += len(whole) - len(prompt)
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
