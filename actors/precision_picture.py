"""A picture of random patches before the text that models which see are compared on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actors.image_processors import rows_and_columns
from actors.pictures import sight_of
from algorithms.data import FloatRow, Picture, Vision, float_row
from bridge.rules import VisionSpec

_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """The picture's patches [P, C], and where its tokens are in the row. `tile`: of rows that are tiles."""

    patches_PC: FloatRow
    vision: Vision
    image_token_id: int
    tile: tuple[int, int] | None = None

    def inputs(self, tokens: torch.Tensor) -> Mapping[str, Any]:
        """What transformers takes besides the tokens [1, S]."""
        values = torch.from_numpy(self.patches_PC.copy()).to(tokens.device)
        if self.tile is not None:
            return {"pixel_values": values.unflatten(1, (-1, *self.tile))}
        return {
            "pixel_values": values,
            "image_grid_thw": torch.tensor(
                [picture.grid for picture in self.vision.pictures], device=tokens.device
            ),
            "mm_token_type_ids": (tokens == self.image_token_id).int(),
        }


def show(vision: VisionSpec, tokens: list[int], seed: int, multiple_of: int) -> tuple[list[int], Shown]:
    """The tokens after those of a picture, of which there are a multiple of `multiple_of`; and the picture.

    The last token is only a label: the model sees the row without it, and so does the picture's place in it.
    """
    grid, shape = (_patches if vision.tile is None else _tiles)(vision, multiple_of)
    patches = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    picture = Picture(sources=(), grid=grid)
    sight = sight_of(vision)
    row = [vision.image_token_id] * sight.num_tokens(picture) + tokens
    seen = sight.vision_of(row[:-1], [picture])
    assert seen is not None, "it has tokens"
    return row, Shown(
        patches_PC=float_row(patches.numpy()),
        vision=seen,
        image_token_id=vision.image_token_id,
        tile=vision.tile,
    )


_Sizes = tuple[tuple[int, int, int], tuple[int, int]]


def _patches(vision: VisionSpec, multiple_of: int) -> _Sizes:
    """A grid, and the shape of its patches."""
    side, config = vision.spatial_merge_size, vision.config
    count = _TOKENS + -_TOKENS % multiple_of
    grid = (1, side, count * side) if count % 2 else (1, 2 * side, count // 2 * side)
    size = config["in_channels"] * config["temporal_patch_size"] * config["patch_size"] ** 2
    return grid, (grid[1] * grid[2], size)


def _tiles(vision: VisionSpec, multiple_of: int) -> _Sizes:
    rows, columns = rows_and_columns(vision)
    assert vision.tile is not None, "rows are tiles"
    tokens = rows * columns // vision.spatial_merge_size**2
    count = multiple_of // math.gcd(tokens, multiple_of)
    size = vision.config["vision_config"]["num_channels"] * vision.tile[0] * vision.tile[1]
    return (count, rows, columns), (count, size)
