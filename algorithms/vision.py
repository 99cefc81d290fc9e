"""Where the tokens of pictures are in a sequence: their features, and the positions of all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from algorithms.data import IntRow, Picture, Vision, int_row
from configs.errors import BasculeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a model makes of pictures: `merge` x `merge` patches become one token.

    Frames of a video are `tokens_per_second` positions apart for each second, 1 where it is None; with
    `timestamps` each is a picture of its own behind a text that tells its time.
    """

    image_token_id: int
    video_token_id: int
    merge: int
    tokens_per_second: float | None
    timestamps: bool

    def num_tokens(self, picture: Picture) -> int:
        """Tokens of a picture."""
        time, height, width = picture.grid
        return time * (height // self.merge) * (width // self.merge)


def place_pictures(tokens: IntRow, pictures: Sequence[Picture], sight: Sight) -> Vision:
    """What a sequence shows whose `pictures` are in the order of their tokens.

    Raises BasculeError when it has not as many tokens for them as they have features.
    """
    visual_T = (tokens == sight.image_token_id) | (tokens == sight.video_token_id)
    wanted, found = sum(sight.num_tokens(picture) for picture in pictures), int(visual_T.sum())
    if found != wanted:
        raise BasculeError(
            f"{len(pictures)} pictures have {wanted} features, the sequence has {found} tokens for them"
        )
    grids: list[tuple[int, int, int]] = []
    intervals: list[float] = []
    for picture in pictures:
        time, height, width = picture.grid
        frames = time if picture.video and sight.timestamps else 1
        grids += [(time // frames, height // sight.merge, width // sight.merge)] * frames
        timed = picture.video and sight.tokens_per_second is not None
        intervals += [(sight.tokens_per_second or 1) * picture.seconds if timed else 1.0] * frames
    return Vision(
        pictures=tuple(pictures),
        slots_T=int_row(np.where(visual_T, np.cumsum(visual_T), 0)),
        positions_3T=int_row(positions_of(~visual_T, grids, intervals)),
    )


def positions_of(
    text_T: NDArray[np.bool_], grids: Sequence[tuple[int, int, int]], intervals: Sequence[float]
) -> NDArray[np.int64]:
    """Positions [3, T] in time, height and width.

    Text (true in `text_T`) counts on, the same in all three. Visual tokens are grids of frames x rows x columns
    (`grids`, in tokens), which count along each from where the text was, frames `intervals` apart; the text goes
    on after the longer side (Qwen2-VL, arXiv 2409.12191, section 2.1; transformers' get_rope_index).
    """
    positions = np.zeros((3, text_T.size), np.int64)
    place, now = 0, 0
    for grid, interval in zip(grids, intervals, strict=True):
        while text_T[place]:
            positions[:, place] = now
            place, now = place + 1, now + 1
        counts = np.indices(grid).reshape(3, -1)
        counts[0] = (counts[0] * interval).astype(np.int64)
        positions[:, place : place + counts.shape[1]] = counts + now
        place += counts.shape[1]
        now += max(grid[1:])
    positions[:, place:] = np.arange(now, now + text_T.size - place)
    return positions


def join_vision(
    visions: Sequence[Vision | None], starts: Sequence[int] | NDArray[np.int64], length: int
) -> Vision | None:
    """What a row of `length` tokens shows whose sequences start at `starts`; None where none shows anything."""
    if not any(visions):
        return None
    slots_T, positions_3T = np.zeros(length, np.int64), np.tile(np.arange(length), (3, 1))
    pictures: list[Picture] = []
    features = 0
    for vision, start in zip(visions, starts, strict=False):
        if vision is None:
            positions_3T[:, start:] = np.arange(length - start)
            continue
        inside = slice(start, start + vision.slots_T.size)
        slots_T[inside] = np.where(vision.slots_T > 0, vision.slots_T + features, 0)
        positions_3T[:, inside] = vision.positions_3T
        features += int(vision.slots_T.max(initial=0))
        pictures += vision.pictures
    return Vision(pictures=tuple(pictures), slots_T=int_row(slots_T), positions_3T=int_row(positions_3T))
