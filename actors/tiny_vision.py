"""A tiny random model that sees, and pictures of numbers that it learns to read."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from actors.pictures import PREPROCESSOR
from actors.tiny_model import END, MAX_LENGTH, PAD, save_random, train_tokenizer, write_rows

START, IMAGE, VIDEO, STOP = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PATCH, MERGE = 8, 2
WIDTH, HEIGHT = 48, 32
"""Pixels of a picture, which is 3 x 2 tokens."""
_DEVIATION = 0.05
"""Of random weights: with transformers' 0.02 the pictures go unnoticed for hundreds of steps."""
_LANGUAGE: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_LENGTH,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
    "bos_token_id": None,
    "initializer_range": _DEVIATION,
}
_TOWER: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
    "initializer_range": _DEVIATION,
}


def build_tiny_vision_model(output_dir: Path, *, seed: int) -> Path:
    """Write a random qwen3_vl of 0.3 M parameters with tokenizer and preprocessor, and return `output_dir`.

    float32 safetensors; tensor parallel 2 and pipeline parallel 2 both fit. The same seed gives the same bytes.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer((START, IMAGE, VIDEO, STOP), CHAT_TEMPLATE)
    ids = tokenizer.get_vocab()
    config = Qwen3VLConfig(
        text_config={
            **_LANGUAGE,
            "vocab_size": len(tokenizer),
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
        },
        vision_config=dict(_TOWER),
        vision_start_token_id=ids[START],
        vision_end_token_id=ids[STOP],
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        tie_word_embeddings=True,
    )
    save_random(lambda: Qwen3VLForConditionalGeneration(config), tokenizer, output_dir, seed)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 256, "longest_edge": 16384},
    }
    (output_dir / PREPROCESSOR).write_text(json.dumps(preprocessor, indent=2) + "\n")
    return output_dir


def write_numbers(output_dir: Path, seed: int, *, train: int = 2000, held_out: int = 200) -> Path:
    """Write train.jsonl, eval.jsonl and the pictures of their rows to `output_dir`, and return it.

    Rows are {"prompt", "completion", "answer"}, for sft and grpo. Of the hundred numbers of two digits ten are
    only in eval.jsonl.
    """
    generator = random.Random(seed)
    numbers = [f"{number:02d}" for number in range(100)]
    generator.shuffle(numbers)
    for name, chosen, count in (("train", numbers[10:], train), ("eval", numbers[:10], held_out)):
        folder = output_dir / f"{name}-pictures"
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(output_dir / f"{name}.jsonl", _rows(folder, chosen, count, generator))
    return output_dir


def _rows(folder: Path, numbers: list[str], count: int, generator: random.Random) -> Iterator[dict[str, Any]]:
    for row in range(count):
        number, path = generator.choice(numbers), folder / f"{row}.png"
        draw_number(number, generator).save(path)
        question = [{"type": "image", "image": str(path)}, {"type": "text", "text": "number"}]
        prompt = [{"role": "user", "content": question}]
        yield {"prompt": prompt, "completion": number, "answer": number}


def draw_number(number: str, generator: random.Random) -> Image.Image:
    """A picture of a number of two digits, somewhat aside."""
    image = Image.new("L", (WIDTH, HEIGHT), 255)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(24)
    place = (8 + generator.randrange(-2, 3), 2 + generator.randrange(-2, 3))
    draw.text(place, number, fill=0, font=font)
    return image
