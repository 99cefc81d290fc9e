"""Pictures of a dataset: how large a model sees them, and the patches that its vision tower takes."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.image_processors import image_processor
from algorithms.data import FloatRow, Picture, float_row
from algorithms.vision import Sight
from bridge.rules import VisionSpec
from configs.errors import BasculeError, ConfigError
from configs.vision import VisionConfig

PREPROCESSOR = "preprocessor_config.json"
_PROCESSOR = "processor_config.json"
"""Where transformers 5 writes the same among others."""
_ORIENTATION = 0x0112
_TURNED = range(5, 9)
"""Orientations, as cameras note them, in which height and width are exchanged."""


def sight_of(vision: VisionSpec, around: tuple[int, int] | None = None) -> Sight:
    """What the model makes of pictures; `around` are tokens that stand about one."""
    return Sight(
        image_token_id=vision.image_token_id,
        video_token_id=vision.video_token_id,
        merge=vision.spatial_merge_size,
        tokens_per_second=vision.tokens_per_second,
        timestamps=vision.timestamps,
        in_a_row=vision.mrope_section is None,
        around=around,
    )


class PictureReader:
    """Reads pictures for one model."""

    def __init__(self, directory: Path, vision: VisionSpec, config: VisionConfig) -> None:
        """Raises ConfigError naming the file of the directory that is missing or wrong."""
        path, found = _preprocessor(directory)
        try:
            self._processor = image_processor(found, vision, config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        self._root = config.root_image_dir
        self._sight = sight_of(vision, _around(directory) if vision.tile is not None else None)

    @property
    def sight(self) -> Sight:
        """What the model makes of pictures."""
        return self._sight

    def picture(self, source: str | bytes, place: str) -> Picture:
        """An image, of which only the head is read. Raises ConfigError naming `place` and the file."""
        if isinstance(source, str):
            source = str((self._root or Path()).joinpath(source).absolute())
        try:
            with _opened(source) as image:
                width, height = image.size
                if image.getexif().get(_ORIENTATION) in _TURNED:
                    width, height = height, width
            grid = self._processor.grid(height, width)
        # PIL's readers of foreign files raise many things, and sizes that cannot be resized are a ValueError.
        except Exception as error:
            raise ConfigError(f"{place}: {_name(source)} cannot be read as an image: {error}") from error
        return Picture(sources=(source,), grid=grid)

    def patches(self, pictures: Sequence[Picture]) -> FloatRow:
        """The patches [P, C] of the pictures. Raises BasculeError naming the file that has changed since."""
        return float_row(np.concatenate([self._patches(picture) for picture in pictures]))

    def _patches(self, picture: Picture) -> FloatRow:
        from PIL import ImageOps

        (source,) = picture.sources
        try:
            with _opened(source) as image:
                found, grid = self._processor.patches(ImageOps.exif_transpose(image))
        except Exception as error:
            raise BasculeError(f"{_name(source)} cannot be read as an image: {error}") from error
        if grid != picture.grid:
            raise BasculeError(
                f"{_name(source)} has another size than when the run started: {grid} patches, not {picture.grid}"
            )
        return found


def _preprocessor(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's config, and the file that it is in."""
    path, whole = directory / PREPROCESSOR, directory / _PROCESSOR
    if not path.is_file() and whole.is_file():
        path = whole
    try:
        found = json.loads(path.read_text())
        return path, found["image_processor"] if path == whole else found
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: a model that sees pictures needs it: {error!r}") from error


def _around(directory: Path) -> tuple[int, int]:
    """Ids of the tokens before and after an image where the chat template has only its place."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    names = getattr(tokenizer, "start_image_token", "<img>"), getattr(tokenizer, "end_image_token", "</img>")
    start, end = map(tokenizer.convert_tokens_to_ids, names)
    if None in (start, end) or tokenizer.unk_token_id in (start, end):
        raise ConfigError(f"{directory}: the tokenizer lacks {' or '.join(names)}, which stand about images")
    return start, end


def _opened(source: str | bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _name(source: str | bytes) -> str:
    return source if isinstance(source, str) else f"an image of {len(source)} bytes in the row"
