"""vLLM engines that see: what they think of completions to pictures, against transformers on the same weights."""

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from actors.pictures import PREPROCESSOR
from actors.tiny_model import END, PAD, train_tokenizer
from actors.tiny_vision import CHAT_TEMPLATE, IMAGE, MERGE, PATCH, START, STOP, VIDEO, draw_number
from algorithms.data import Group

pytestmark = pytest.mark.engine

TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
}
INTERLEAVED = {
    **TEXT,
    "head_dim": 32,
    "rope_parameters": {**TEXT["rope_parameters"], "mrope_interleaved": True},
}
TOWER = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE, "hidden_size": 32}
QWEN3_TOWER = {
    **TOWER,
    "intermediate_size": 48,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
CONFIGS: dict[str, tuple[type[hf.PretrainedConfig], dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        hf.Qwen2VLConfig,
        TEXT,
        {**TOWER, "embed_dim": 32, "hidden_size": 128, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": (
        hf.Qwen2_5_VLConfig,
        TEXT,
        {
            **TOWER,
            "intermediate_size": 48,
            "out_hidden_size": 128,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": (hf.Qwen3VLConfig, INTERLEAVED, QWEN3_TOWER),
    "qwen3_vl_moe": (hf.Qwen3VLMoeConfig, {**INTERLEAVED, **EXPERTS}, QWEN3_TOWER),
}


def save_model(name: str, folder: Path) -> Any:
    """A random model with tokenizer and preprocessor."""
    tokenizer = train_tokenizer((START, IMAGE, VIDEO, STOP), CHAT_TEMPLATE)
    ids = tokenizer.get_vocab()
    kind, text, tower = CONFIGS[name]
    common = {
        "vocab_size": len(tokenizer),
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
        "bos_token_id": None,
    }
    config = kind(
        text_config={**text, **common},
        vision_config=tower,
        vision_start_token_id=ids[START],
        vision_end_token_id=ids[STOP],
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    model: Any = hf.AutoModelForImageTextToText.from_config(config).float().eval()
    for key, tensor in model.named_parameters():
        spread = (torch.nn.init.uniform_, 0.5, 1.5) if "norm" in key else (torch.nn.init.normal_, 0.0, 0.1)
        spread[0](tensor, *spread[1:])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    size = {"size": {"shortest_edge": 256, "longest_edge": 16384}}
    (folder / PREPROCESSOR).write_text(json.dumps(preprocessor | size))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, and rows with two pictures of different sizes, with one, and with none."""
    folder = tmp_path_factory.mktemp("seeing")
    generator = random.Random(3)
    small, large = (
        draw_number("37", generator),
        draw_number("58", generator).resize((64, 48), Image.Resampling.BICUBIC),
    )
    small.save(folder / "small.png")
    large.convert("RGB").save(folder / "large.jpg")
    pictures = [{"type": "image", "image": str(folder / name)} for name in ("small.png", "large.jpg")]
    text = {"type": "text", "text": "range"}
    contents = [[pictures[0], text, pictures[1], text], [text, pictures[1]], "range 123"]
    rows = [{"messages": [{"role": "user", "content": content}], "answer": "1"} for content in contents]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Any]:
    return {name: save_model(name, folder / name) for name in CONFIGS}


@pytest.fixture(scope="module")
def answers(folder: Path, models: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.actors.engine_seeing", str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return pickle.loads((folder / "answers.pickle").read_bytes())


def reference(model: Any, folder: Path, group: Group, index: int) -> np.ndarray:
    """What transformers thinks of every token but the first of a prompt and its completion."""
    row = torch.tensor([[*group.prompt.tokens.tolist(), *group.rollouts[index].tokens.tolist()]])
    images = [
        Image.open(part["image"])
        for message in group.prompt.messages
        for part in message["content"]
        if isinstance(part, dict) and part["type"] == "image"
    ]
    seen = Qwen2VLImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt") if images else {}
    types = (row == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(input_ids=row, mm_token_type_ids=types, **seen).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, row[0, 1:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", CONFIGS)
def test_completions_to_pictures_have_transformers_log_probabilities(
    answers: dict[str, Any], models: dict[str, Any], folder: Path, family: str
) -> None:
    groups = answers[family]["groups"]
    assert [len(group.prompt.vision.pictures) if group.prompt.vision else 0 for group in groups] == [2, 1, 0]
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            expected = reference(models[family], folder / family, group, index)
            own = expected[group.prompt.tokens.size - 1 :]
            np.testing.assert_allclose(rollout.logprobs, own, atol=2e-5)
    expected = reference(models[family], folder / family, groups[0], 0)
    np.testing.assert_allclose(answers[family]["score"], expected, atol=2e-5)
    # Pictures matter: the same tokens without them are something else.
    assert np.abs(np.array(answers[family]["blind"]) - expected).max() > 1e-3
    for rollout, again in zip(groups[0].rollouts, answers[family]["again"].rollouts, strict=True):
        np.testing.assert_array_equal(rollout.tokens, again.tokens)
        np.testing.assert_allclose(rollout.logprobs, again.logprobs, atol=2e-5)


def test_infer_shows_a_picture(answers: dict[str, Any], models: dict[str, Any], folder: Path) -> None:
    model, tokenizer = models["qwen3_vl"], hf.AutoTokenizer.from_pretrained(folder / "qwen3_vl")
    picture = Image.open(folder / "small.png")
    seen = Qwen2VLImageProcessorPil.from_pretrained(folder / "qwen3_vl")([picture], return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": "range"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    tokens: list[int] = tokenizer(text.replace(IMAGE, IMAGE * (int(seen["image_grid_thw"].prod()) // 4)))[
        "input_ids"
    ]
    said: list[int] = []
    while len(said) < 6 and said[-1:] != [tokenizer.eos_token_id]:
        row = torch.tensor([[*tokens, *said]])
        with torch.no_grad():
            logits = model(
                input_ids=row, mm_token_type_ids=(row == model.config.image_token_id).int(), **seen
            ).logits
        said.append(int(logits[0, -1].argmax()))
    assert answers["infer"] == tokenizer.decode(said, skip_special_tokens=True)
    assert answers["infer"]
