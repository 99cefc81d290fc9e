"""A tiny random InternVL and what transformers' processor makes of texts with images."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from actors.pictures import PREPROCESSOR
from actors.tiny_model import END, PAD, save_random, train_tokenizer
from actors.tiny_vision import CHAT_TEMPLATE

START, CONTEXT, STOP, VIDEO = "<img>", "<IMG_CONTEXT>", "</img>", "<video>"
TILE = 16
"""Pixels of a tile's side, which is 4 x 4 tokens."""
_MARKS = "<|vision_start|><|image_pad|><|vision_end|>"


def build_tiny_internvl(directory: Path, seed: int, *, tied: bool = False) -> Path:
    """The directory, with the model's weights, tokenizer and config of the image processor."""
    directory.mkdir(parents=True, exist_ok=True)
    template = CHAT_TEMPLATE.replace(_MARKS, f"{CONTEXT}\\n")
    tokenizer = train_tokenizer((START, CONTEXT, STOP, VIDEO), template)
    ids = tokenizer.get_vocab()
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
        "tie_word_embeddings": tied,
    }
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": TILE,
        "patch_size": 2,
    }
    config = InternVLConfig(
        text_config=text, vision_config=tower, image_token_id=ids[CONTEXT], tie_word_embeddings=tied
    )
    save_random(lambda: InternVLForConditionalGeneration(config), tokenizer, directory, seed)
    processor = {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": TILE, "width": TILE}}
    processor |= {"max_patches": 6}
    (directory / PREPROCESSOR).write_text(json.dumps(processor) + "\n")
    return directory


def processed(directory: Path, text: str, images: Sequence[Image.Image]) -> tuple[list[int], torch.Tensor]:
    """Ids of the text and the images' tiles, as transformers' processor of the model makes them.

    The whole one needs torchvision, for videos; here are its parts.
    """
    found = GotOcr2ImageProcessorPil.from_pretrained(directory)(
        list(images), crop_to_patches=True, return_tensors="pt"
    )
    processor: Any = SimpleNamespace(
        start_image_token=START, end_image_token=STOP, image_token=CONTEXT, image_seq_length=16
    )
    first, *rest = text.split(CONTEXT)
    for number, part in enumerate(rest):
        first += InternVLProcessor.replace_image_token(processor, found, number) + part
    return AutoTokenizer.from_pretrained(directory)(first)["input_ids"], found["pixel_values"]
