"""Sequences with pictures for the models that see, and the same as what transformers takes.

transformers finds the places and positions of pictures itself.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from algorithms.data import FloatRow, MicroBatch, Picture, float_row, int_row
from algorithms.vision import Sight

START, END, IMAGE, VIDEO = 120, 121, 122, 123
"""Ids in a vocabulary of 131 tokens."""
PATCH, MERGE, TILE = 2, 2, 8
IDS = {
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
_SECONDS = 0.5


@cache
def processor() -> Any:
    """The one that needs no torchvision."""
    limits = {"shortest_edge": 16, "longest_edge": 400}
    return Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=limits)


@cache
def tiles() -> Any:
    """InternVL's."""
    size = {"height": TILE, "width": TILE}
    return GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=4)


@cache
def patches_of(source: str) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Patches and grid of a random image; the source is `number WxH`, or `number WxH tiles`."""
    number, size, *tiled = source.split(" ")
    width, height = map(int, size.split("x"))
    pixels = np.random.default_rng(int(number)).integers(0, 256, (height, width, 3), np.uint8)
    if tiled:
        found = tiles()(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        return found.flatten(1), (len(found), TILE // PATCH, TILE // PATCH)
    found = processor()(Image.fromarray(pixels), return_tensors="pt")
    return found["pixel_values"], tuple(found["image_grid_thw"][0].tolist())


def picture(*sources: str, seconds: float = 1.0) -> Picture:
    """An image, or of several files the video whose frames they are, two at a step."""
    time, height, width = patches_of(sources[0])[1]
    if len(sources) == 1:
        return Picture(sources=sources, grid=(time, height, width))
    return Picture(sources=sources, grid=(len(sources) // 2, height, width), video=True, seconds=seconds)


def patches(shown: Picture) -> torch.Tensor:
    """Of a video, frame by frame in the two halves of a patch: [frames / 2, patches, channel, 2, pixels]."""
    frames = [patches_of(source)[0] for source in shown.sources]
    if not shown.video:
        return frames[0]
    split = [frame.view(len(frame), 3, 2, -1)[:, :, 0] for frame in frames]
    pairs = [torch.stack(pair, dim=2).flatten(1) for pair in zip(split[::2], split[1::2], strict=True)]
    return torch.cat(pairs)


def look(pictures: Sequence[Picture]) -> FloatRow:
    """What the trainer asks for."""
    return float_row(torch.cat([patches(shown) for shown in pictures]).numpy())


def make_sequences(config: hf.PretrainedConfig) -> list[MicroBatch]:
    """Text only; two images of different sizes; a video; an image and a video (InternVL has none)."""
    stamped = config.model_type.startswith("qwen3")
    tower, tiled = config.vision_config, config.model_type == "internvl"
    sight = Sight(
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        merge=MERGE,
        tokens_per_second=tower.tokens_per_second if config.model_type == "qwen2_5_vl" else None,
        timestamps=stamped,
        in_a_row=tiled,
    )
    small, wide, tall = (picture(source + " tiles" * tiled) for source in ("1 8x8", "2 13x8", "3 9x17"))
    video = picture("4 8x9", "5 8x9", "6 8x9", "7 8x9", seconds=_SECONDS)
    rng = np.random.default_rng(5)

    def text(count: int) -> list[int]:
        return rng.integers(0, START, count).tolist()

    def shown(each: Picture) -> list[int]:
        count, steps = sight.num_tokens(each), each.grid[0]
        if not each.video:
            return [START, *[IMAGE] * count, END]
        if not stamped:
            return [START, *[VIDEO] * count, END]
        frame = [START, *[VIDEO] * (count // steps), END]
        return [token for _ in range(steps) for token in [*text(2), *frame]]

    parts = [(6, [], 3), (2, [small, tall], 4), (3, [video], 2), (1, [wide, video], 5)]
    if tiled:
        parts = [(6, [], 3), (2, [small, tall], 4), (1, [wide], 5)]
    rows: list[MicroBatch] = []
    for before, pictures, after in parts:
        between = [token for each in pictures for token in [*shown(each), *text(1)]]
        row = [*text(before), *between, *text(after)]
        mask = rng.integers(0, 2, len(row))
        mask[0], mask[-1] = 1, 0
        tokens = int_row(row)
        rows.append(
            MicroBatch(
                tokens_T=tokens,
                labels_T=int_row([*row[1:], 130]),
                positions_T=int_row(range(len(row))),
                starts_S=int_row([0, len(row)]),
                loss_mask_T=int_row(mask),
                advantages_T=float_row(rng.normal(size=len(row))),
                logprobs_T=float_row(np.zeros(len(row))),
                vision=sight.vision_of(row, pictures),
            )
        )
    return rows


def inputs_of(row: MicroBatch) -> dict[str, Any]:
    """What transformers' processors make of the sequence."""
    tokens = torch.tensor(row.tokens_T, dtype=torch.int64)[None]
    inputs: dict[str, Any] = {"input_ids": tokens}
    if row.vision is None:
        return inputs
    if any(source.endswith(" tiles") for each in row.vision.pictures for source in map(str, each.sources)):
        values = torch.cat([patches(each) for each in row.vision.pictures])
        return inputs | {"pixel_values": values.unflatten(1, (3, TILE, TILE))}
    inputs["mm_token_type_ids"] = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    for video, values, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        found = [each for each in row.vision.pictures if each.video == video]
        if found:
            inputs[values] = torch.cat([patches(each) for each in found])
            inputs[grid] = torch.tensor([each.grid for each in found])
    if any(each.video for each in row.vision.pictures):
        inputs["second_per_grid_ts"] = torch.tensor([_SECONDS])
    return inputs
