"""Videos of a dataset for Qwen's models: which of their frames a model sees, how large, and their patches.

What transformers' video processors do, without torchvision: frames are resized by PIL, as images are. Files are
read by OpenCV, which vLLM brings along.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from algorithms.data import FloatRow, Picture, float_row
from bridge.rules import VisionSpec
from configs.errors import ConfigError
from configs.vision import VisionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Film:
    """A video before any of it is chosen: frames of `height` x `width` pixels, `fps` for each second."""

    frames: int
    fps: float
    height: int
    width: int


class VideoProcessor:
    """Of one model; `found` is its video processor's config."""

    def __init__(self, found: Mapping[str, Any], vision: VisionSpec, config: VisionConfig) -> None:
        """Raises ConfigError for limits that contradict each other."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self._processor: Any = Qwen2VLImageProcessorPil.from_dict(dict(found))
        self._config, self._of_all_frames = config, vision.timestamps
        self._step: int = self._processor.temporal_patch_size
        self._side: int = self._processor.patch_size * vision.spatial_merge_size
        size = self._processor.size
        if not {"size", "min_pixels", "max_pixels"} & found.keys():
            # transformers' own, which are not those of images.
            size = {"shortest_edge": 128 * self._side**2, "longest_edge": 768 * self._side**2}
        self._least, self._most = int(size["shortest_edge"]), int(size["longest_edge"])

    def chosen(self, film: Film, *, is_file: bool) -> list[int]:
        """Numbers of the frames that are seen: of a file `vision.fps` for each second, else all, within limits.

        They are spread evenly, for Qwen3-VL with the last frame among them (sample_frames of transformers'
        Qwen3VLVideoProcessor and Qwen2VLVideoProcessor).
        """
        least, most, total = self._config.fps_min_frames, self._config.fps_max_frames, film.frames
        wanted = total / film.fps * self._config.fps
        if not is_file or self._of_all_frames:
            count = min(max(int(wanted), least), most, total) if is_file else min(most, total)
            return np.linspace(0, total - 1, count).round().astype(int).tolist()
        most = min(most, total) // self._step * self._step
        count = max(int(min(max(wanted, least), most)) // self._step * self._step, 1)
        return np.arange(0, total, total / count).astype(int).tolist()

    def picture(self, sources: Sequence[str | bytes], film: Film, *, is_file: bool) -> Picture:
        """The video as the model sees it. Raises ValueError for a size that it cannot have."""
        chosen = self.chosen(film, is_file=is_file)
        rows, columns = self._size(len(chosen), film)
        patch = self._processor.patch_size
        padded = [*chosen, *chosen[-1:] * (-len(chosen) % self._step)]
        steps = [padded[first : first + self._step] for first in range(0, len(padded), self._step)]
        return Picture(
            sources=tuple(sources) if is_file else tuple(sources[number] for number in chosen),
            grid=(len(steps), rows // patch, columns // patch),
            video=True,
            seconds=self._step * film.frames / (len(chosen) * film.fps),
            frames=tuple(chosen) if is_file else (),
            # In this order, as texts have what they are when rounded.
            times=tuple((step[0] / film.fps + step[-1] / film.fps) / 2 for step in steps),
        )

    def _size(self, frames: int, film: Film) -> tuple[int, int]:
        """Pixels of a frame, whose limits are those of one, or of Qwen3-VL those of all together."""
        least, most = self._least, self._most
        frames = max(frames, self._step)
        token = self._side**2 * (frames if self._of_all_frames else 1)
        if self._config.video_min_token_num is not None:
            least = self._config.video_min_token_num * token
        if self._config.video_max_token_num is not None:
            limit = self._config.video_max_token_num * token
            most = min(limit, most) if self._of_all_frames else limit
        least = min(least, most)
        if self._of_all_frames:
            from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_all

            return resize_all(frames, film.height, film.width, self._step, self._side, least, most)
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        return smart_resize(film.height, film.width, self._side, least, most)

    def patches(self, images: Sequence[Any], grid: tuple[int, int, int]) -> FloatRow:
        """Patches [P, C] of the frames (PIL's), a step after the other."""
        patch = self._processor.patch_size
        size = (grid[2] * patch, grid[1] * patch)
        resized = [image.convert("RGB").resize(size, resample=self._processor.resample) for image in images]
        resized += resized[-1:] * (grid[0] * self._step - len(resized))
        found = self._processor(resized, do_resize=False, return_tensors="np")["pixel_values"]
        # Of an image alone, it is there once for each frame of a step.
        frames = found.reshape(grid[0], self._step, grid[1] * grid[2], 3, self._step, patch**2)[:, :, :, :, 0]
        return float_row(frames.transpose(0, 2, 3, 1, 4).reshape(grid[0] * grid[1] * grid[2], -1))


def film_of(path: str) -> Film:
    """A video file, of which only the head is read. Raises ConfigError where nothing reads it."""
    cv2: Any = _opencv()
    if not Path(path).is_file():
        raise ConfigError("there is no such file")
    film = cv2.VideoCapture(path)
    try:
        there, first = film.read()
        if not there:
            raise ConfigError("no frame of it can be read; is it a video?")
        frames, fps = int(film.get(cv2.CAP_PROP_FRAME_COUNT)), float(film.get(cv2.CAP_PROP_FPS))
        if frames < 1 or not fps > 0:
            raise ConfigError(
                f"its head says {frames} frames and {fps} for each second; give a list of frames"
            )
        return Film(frames=frames, fps=fps, height=first.shape[0], width=first.shape[1])
    finally:
        film.release()


def frames_of(path: str, numbers: Sequence[int]) -> list[Any]:
    """Some frames of a video file in ascending order, as PIL's images. Raises ConfigError where one is missing."""
    from PIL import Image

    cv2: Any = _opencv()
    film = cv2.VideoCapture(path)
    found: dict[int, Any] = {}
    try:
        for number in range(max(numbers) + 1):
            if not film.grab():
                raise ConfigError(
                    f"it ends before frame {max(numbers)}, of which its head speaks, at {number}"
                )
            if number in numbers:
                _, pixels = film.retrieve()
                found[number] = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))
    finally:
        film.release()
    return [found[number] for number in numbers]


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            "video files need OpenCV: pip install opencv-python-headless; or give a list of frames"
        ) from error
    return cv2
