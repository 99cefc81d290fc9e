"""A picture of random patches before the text that models which see are compared on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actors.pictures import sight_of
from algorithms.data import FloatRow, Picture, Vision, float_row
from bridge.rules import VisionSpec

_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The picture's patches [P, C], and where its tokens are in the row."""

    patches_PC: FloatRow
    vision: Vision
    image_token_id: int

    def inputs(self, tokens: torch.Tensor) -> Mapping[str, Any]:
        """What transformers takes besides the tokens [1, S]."""
        return {
            "pixel_values": torch.from_numpy(self.patches_PC.copy()).to(tokens.device),
            "image_grid_thw": torch.tensor(
                [picture.grid for picture in self.vision.pictures], device=tokens.device
            ),
            "mm_token_type_ids": (tokens == self.image_token_id).int(),
        }


def show(vision: VisionSpec, tokens: list[int], seed: int, multiple_of: int) -> tuple[list[int], Shown]:
    """The tokens after those of a picture, of which there are a multiple of `multiple_of`; and the picture.

    The last token is only a label: the model sees the row without it, and so does the picture's place in it.
    """
    side, config = vision.spatial_merge_size, vision.config
    count = _TOKENS + -_TOKENS % multiple_of
    grid = (1, side, count * side) if count % 2 else (1, 2 * side, count // 2 * side)
    size = config["in_channels"] * config["temporal_patch_size"] * config["patch_size"] ** 2
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(grid[1] * grid[2], size, generator=generator)
    row = [vision.image_token_id] * count + tokens
    seen = sight_of(vision).vision_of(row[:-1], [Picture(sources=(), grid=grid)])
    assert seen is not None, "it has tokens"
    return row, Shown(
        patches_PC=float_row(patches.numpy()), vision=seen, image_token_id=vision.image_token_id
    )
