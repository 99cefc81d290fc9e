"""Pictures of a dataset: how large a model sees them, and the patches that its vision tower takes.

By the image processor of the model directory in transformers' version on PIL, which needs no torchvision.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from algorithms.data import FloatRow, Picture, float_row
from algorithms.vision import Sight
from bridge.rules import VisionSpec
from configs.errors import BasculeError, ConfigError
from configs.vision import VisionConfig

PREPROCESSOR = "preprocessor_config.json"
_ORIENTATION = 0x0112
_TURNED = range(5, 9)
"""Orientations, as cameras note them, in which height and width are exchanged."""


def sight_of(vision: VisionSpec) -> Sight:
    """What the model makes of pictures."""
    return Sight(
        image_token_id=vision.image_token_id,
        video_token_id=vision.video_token_id,
        merge=vision.spatial_merge_size,
        tokens_per_second=vision.tokens_per_second,
        timestamps=vision.timestamps,
    )


class PictureReader:
    """Reads pictures for one model."""

    def __init__(self, directory: Path, vision: VisionSpec, config: VisionConfig) -> None:
        """Raises ConfigError naming the file of the directory that is missing or wrong."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        path = directory / PREPROCESSOR
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: a model that sees pictures needs it: {error}") from error
        self._processor: Any = Qwen2VLImageProcessorPil.from_dict(found)
        self._side = self._processor.patch_size * vision.spatial_merge_size
        self._root = config.root_image_dir
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
        self._sight = sight_of(vision)

    @property
    def sight(self) -> Sight:
        """What the model makes of pictures."""
        return self._sight

    def picture(self, source: str | bytes, place: str) -> Picture:
        """An image, of which only the head is read. Raises ConfigError naming `place` and the file."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        if isinstance(source, str):
            source = str((self._root or Path()).joinpath(source).absolute())
        try:
            with _opened(source) as image:
                width, height = image.size
                if image.getexif().get(_ORIENTATION) in _TURNED:
                    width, height = height, width
            rows, columns = smart_resize(
                height,
                width,
                factor=self._side,
                min_pixels=self._size["shortest_edge"],
                max_pixels=self._size["longest_edge"],
            )
        # PIL's readers of foreign files raise many things, and sizes that cannot be resized are a ValueError.
        except Exception as error:
            raise ConfigError(f"{place}: {_name(source)} cannot be read as an image: {error}") from error
        patch = self._processor.patch_size
        return Picture(sources=(source,), grid=(1, rows // patch, columns // patch))

    def patches(self, pictures: Sequence[Picture]) -> FloatRow:
        """The patches [P, C] of the pictures. Raises BasculeError naming the file that has changed since."""
        return float_row(np.concatenate([self._patches(picture) for picture in pictures]))

    def _patches(self, picture: Picture) -> FloatRow:
        from PIL import ImageOps

        (source,) = picture.sources
        try:
            with _opened(source) as image:
                found = self._processor(ImageOps.exif_transpose(image), size=self._size, return_tensors="np")
        except Exception as error:
            raise BasculeError(f"{_name(source)} cannot be read as an image: {error}") from error
        grid = tuple(found["image_grid_thw"][0].tolist())
        if grid != picture.grid:
            raise BasculeError(
                f"{_name(source)} has another size than when the run started: {grid} patches, not {picture.grid}"
            )
        return found["pixel_values"]


def _opened(source: str | bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _name(source: str | bytes) -> str:
    return source if isinstance(source, str) else f"an image of {len(source)} bytes in the row"
