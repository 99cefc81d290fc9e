"""What models do to an image before they see it, by transformers' image processors on PIL.

They need no torchvision; where it is installed, it is not used.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from algorithms.data import FloatRow, float_row
from bridge.rules import VisionSpec
from configs.errors import ConfigError
from configs.vision import VisionConfig

Grid = tuple[int, int, int]


class ImageProcessor(Protocol):
    """Of one model."""

    def grid(self, height: int, width: int) -> Grid:
        """Patches in time, height and width of an image of so many pixels. Raises ValueError for a size that it
        cannot have."""
        ...

    def patches(self, image: Any) -> tuple[FloatRow, Grid]:
        """A PIL image's patches [P, C], and its grid."""
        ...


def image_processor(found: Mapping[str, Any], vision: VisionSpec, config: VisionConfig) -> ImageProcessor:
    """The one that the model needs; `found` is its config. Raises ConfigError naming options it cannot follow."""
    return Patches(found, vision, config) if vision.tile is None else Tiles(found, vision, config)


class Patches:
    """Qwen's: an image is resized to a multiple of a token's side, and seen whole."""

    def __init__(self, found: Mapping[str, Any], vision: VisionSpec, config: VisionConfig) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self._processor: Any = Qwen2VLImageProcessorPil.from_dict(dict(found))
        self._side = self._processor.patch_size * vision.spatial_merge_size
        size = dict(self._processor.size)
        tokens = (config.image_min_token_num, config.image_max_token_num)
        for edge, pixels, count in zip(
            ("shortest_edge", "longest_edge"), (config.min_pixels, config.max_pixels), tokens, strict=True
        ):
            limit = count * self._side**2 if count is not None else pixels
            size[edge] = limit if limit is not None else size[edge]
        if size["shortest_edge"] > size["longest_edge"]:
            raise ConfigError(
                f"vision: images of at least {size['shortest_edge']} pixels cannot have at most "
                f"{size['longest_edge']}"
            )
        self._size = size

    def grid(self, height: int, width: int) -> Grid:
        """As the protocol says."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        rows, columns = smart_resize(
            height,
            width,
            factor=self._side,
            min_pixels=self._size["shortest_edge"],
            max_pixels=self._size["longest_edge"],
        )
        patch = self._processor.patch_size
        return 1, rows // patch, columns // patch

    def patches(self, image: Any) -> tuple[FloatRow, Grid]:
        """As the protocol says."""
        found = self._processor(image, size=self._size, return_tensors="np")
        time, rows, columns = found["image_grid_thw"][0].tolist()
        return found["pixel_values"], (time, rows, columns)


class Tiles:
    """InternVL's: an image is cut into tiles of one size, with the whole as one more where they are several.

    In a grid the tiles are steps in time; a row of its patches is a tile.
    """

    def __init__(self, found: Mapping[str, Any], vision: VisionSpec, config: VisionConfig) -> None:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        for option in ("image_min_token_num", "min_pixels", "max_pixels"):
            if getattr(config, option) is not None:
                raise ConfigError(
                    f"vision.{option}: this model sees tiles of one size, which vision.image_max_token_num alone "
                    "limits"
                )
        assert vision.tile is not None, "it sees tiles"
        self._rows, self._columns = rows_and_columns(vision)
        # What transformers' processor of the model asks for, whatever the file says.
        self._options: dict[str, Any] = {"crop_to_patches": True}
        self._processor: Any = GotOcr2ImageProcessorPil.from_dict(dict(found))
        size = dict(self._processor.size)
        if (size.get("height"), size.get("width")) != vision.tile:
            raise ConfigError(f"size {size} is not that of the vision tower's tiles, {vision.tile}")
        if config.image_max_token_num is not None:
            self._options |= self._at_most(config.image_max_token_num, vision)

    def _at_most(self, tokens: int, vision: VisionSpec) -> dict[str, int]:
        each = self._rows * self._columns // vision.spatial_merge_size**2
        if tokens < each:
            raise ConfigError(
                f"vision.image_max_token_num: {tokens} is less than the {each} tokens of a tile"
            )
        # Several tiles come with one of the whole.
        tiles = max(1, tokens // each - 1)
        most = min(tiles, self._processor.max_patches)
        return {"max_patches": most, "min_patches": min(most, self._processor.min_patches)}

    def grid(self, height: int, width: int) -> Grid:
        """As the protocol says."""
        tiles = self._processor.get_number_of_image_patches(height, width, self._options)
        return tiles, self._rows, self._columns

    def patches(self, image: Any) -> tuple[FloatRow, Grid]:
        """As the protocol says."""
        found = self._processor(image, return_tensors="np", **self._options)["pixel_values"]
        return float_row(np.reshape(found, (len(found), -1))), (len(found), self._rows, self._columns)


def rows_and_columns(vision: VisionSpec) -> tuple[int, int]:
    """Patches of a tile."""
    assert vision.tile is not None, "the model sees tiles"
    tower = vision.config["vision_config"]
    rows, columns = (side // patch for side, patch in zip(vision.tile, tower["patch_size"], strict=True))
    return rows, columns
