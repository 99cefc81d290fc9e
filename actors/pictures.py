"""Pictures of a dataset: how large a model sees them, and the patches that its vision tower takes."""

import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actors.image_processors import image_processor
from actors.videos import Film, VideoProcessor, film_of, frames_of
from algorithms.data import Clip, FloatRow, Picture, Source, float_row
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


def sight_of(vision: VisionSpec, tokenizer: Any = None) -> Sight:
    """What the model makes of pictures; of rows of text with a `tokenizer`."""
    tiled = vision.tile is not None
    return Sight(
        image_token_id=vision.image_token_id,
        video_token_id=vision.video_token_id,
        merge=vision.spatial_merge_size,
        tokens_per_second=vision.tokens_per_second,
        timestamps=vision.timestamps,
        in_a_row=vision.mrope_section is None,
        around=_about_tiles(tokenizer) if tiled and tokenizer is not None else vision.marks,
        encode=None if tokenizer is None else partial(tokenizer.encode, add_special_tokens=False),
    )


class PictureReader:
    """Reads pictures for one model."""

    def __init__(self, directory: Path, vision: VisionSpec, config: VisionConfig) -> None:
        """Raises ConfigError naming the file of the directory that is missing or wrong."""
        from transformers import AutoTokenizer

        path, found = _preprocessor(directory)
        try:
            self._images = image_processor(found, vision, config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        self._videos = None
        if vision.tile is None:
            self._videos = VideoProcessor(_video_preprocessor(directory) or found, vision, config)
        self._root, self._fps = config.root_image_dir or Path(), config.fps
        self._sight = sight_of(vision, AutoTokenizer.from_pretrained(directory, local_files_only=True))

    @property
    def sight(self) -> Sight:
        """What the model makes of pictures."""
        return self._sight

    def picture(self, source: Source, place: str) -> Picture:
        """An image or a video, of which only heads are read. Raises ConfigError naming `place` and the file."""
        if isinstance(source, Clip):
            return self._video(source, place)
        source = self._absolute(source)
        try:
            grid = self._images.grid(*_size(source))
        # PIL's readers of foreign files raise many things, and sizes that cannot be resized are a ValueError.
        except Exception as error:
            raise ConfigError(f"{place}: {_name(source)} cannot be read as an image: {error}") from error
        return Picture(sources=(source,), grid=grid)

    def _video(self, clip: Clip, place: str) -> Picture:
        if self._videos is None:
            raise ConfigError(f"{place}: videos are not read for this model; give some frames as images")
        sources = tuple(map(self._absolute, clip.sources))
        source = sources[0]
        try:
            if clip.is_file:
                assert isinstance(source, str), "the path of a file"
                film = film_of(source)
            else:
                sizes = []
                for source in sources:
                    sizes.append(_size(source))
                    if sizes[-1] != sizes[0]:
                        raise ConfigError(f"it has {sizes[-1]} pixels, the video's first frame {sizes[0]}")
                film = Film(
                    frames=len(sources), fps=clip.fps or self._fps, height=sizes[0][0], width=sizes[0][1]
                )
            return self._videos.picture(sources, film, is_file=clip.is_file)
        except Exception as error:
            what = "a video" if clip.is_file else "a frame"
            raise ConfigError(f"{place}: {_name(source)} cannot be read as {what}: {error}") from error

    def _absolute(self, source: str | bytes) -> str | bytes:
        return source if isinstance(source, bytes) else str((self._root / source).absolute())

    def patches(self, pictures: Sequence[Picture]) -> FloatRow:
        """The patches [P, C] of the pictures. Raises BasculeError naming the file that has changed since."""
        return float_row(np.concatenate([self._patches(picture) for picture in pictures]))

    def _patches(self, picture: Picture) -> FloatRow:
        name = _name(picture.sources[0])
        try:
            images = _images(picture)
            if picture.video:
                assert self._videos is not None, "it has been looked at"
                return self._videos.patches(images, picture.grid)
            found, grid = self._images.patches(images[0])
        except Exception as error:
            what = "a video" if picture.video else "an image"
            raise BasculeError(f"{name} cannot be read as {what}: {error}") from error
        if grid != picture.grid:
            raise BasculeError(
                f"{name} has another size than when the run started: {grid} patches, not {picture.grid}"
            )
        return found


def _images(picture: Picture) -> list[Any]:
    """PIL's, of an image or of all frames that are seen of a video."""
    from PIL import ImageOps

    if picture.frames:
        (source,) = picture.sources
        assert isinstance(source, str), "the path of a file"
        return frames_of(source, picture.frames)
    found: list[Any] = []
    for source in picture.sources:
        with _opened(source) as image:
            upright = ImageOps.exif_transpose(image)
            upright.load()
            found.append(upright)
    return found


def _size(source: str | bytes) -> tuple[int, int]:
    """Height and width of an image."""
    with _opened(source) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION) in _TURNED
    return (width, height) if turned else (height, width)


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


def _video_preprocessor(directory: Path) -> dict[str, Any] | None:
    """The video processor's config where it is not that of images too."""
    path, whole = directory / "video_preprocessor_config.json", directory / _PROCESSOR
    try:
        if path.is_file():
            return json.loads(path.read_text())
        return json.loads(whole.read_text()).get("video_processor") if whole.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{path if path.is_file() else whole}: {error}") from error


def _about_tiles(tokenizer: Any) -> tuple[int, int]:
    """Ids of the tokens before and after an image where the chat template has only its place."""
    names = getattr(tokenizer, "start_image_token", "<img>"), getattr(tokenizer, "end_image_token", "</img>")
    start, end = map(tokenizer.convert_tokens_to_ids, names)
    if None in (start, end) or tokenizer.unk_token_id in (start, end):
        raise ConfigError(f"the model's tokenizer lacks {' or '.join(names)}, which stand about images")
    return start, end


def _opened(source: str | bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _name(source: str | bytes) -> str:
    return source if isinstance(source, str) else f"an image of {len(source)} bytes in the row"
