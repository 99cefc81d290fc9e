"""Where the tokens of pictures are in a sequence: their features, and the positions of all tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from algorithms.data import Picture, Source, Vision, int_row
from configs.errors import BasculeError


class Eye(Protocol):
    """What knows how large a model sees pictures."""

    @property
    def sight(self) -> "Sight":
        """What the model makes of them."""
        ...

    def picture(self, source: Source, place: str) -> Picture:
        """An image or a video. Raises ConfigError naming `place` and what is wrong."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What a model makes of pictures: `merge` x `merge` patches become one token.

    Frames of a video are `tokens_per_second` positions apart for each second, 1 where it is None; with
    `timestamps` each is a picture of its own behind a text that tells its time. With `in_a_row` visual tokens are
    counted like those of text. `around` are tokens before and after an image that templates leave out, or with
    `timestamps` about each step of a video, after what `encode` makes of its time.
    """

    image_token_id: int
    video_token_id: int
    merge: int
    tokens_per_second: float | None
    timestamps: bool
    in_a_row: bool = False
    around: tuple[int, int] | None = None
    encode: Callable[[str], Sequence[int]] | None = None

    def num_tokens(self, picture: Picture) -> int:
        """Tokens of a picture."""
        time, height, width = picture.grid
        return time * (height // self.merge) * (width // self.merge)

    def expanded(
        self, tokens: Sequence[int], mask: Sequence[int], pictures: Sequence[Picture]
    ) -> tuple[list[int], list[int]]:
        """Tokens and loss mask with as many tokens for each picture as it has features, none of them trained on.

        `tokens` have one for each. Raises BasculeError when they have another number.
        """
        visual = (self.image_token_id, self.video_token_id)
        places = [place for place, token in enumerate(tokens) if token in visual]
        if [tokens[place] for place in places] != [visual[picture.video] for picture in pictures]:
            raise BasculeError(
                f"there are {len(pictures)} pictures, but {len(places)} tokens for them in the filled-in "
                "template, or tokens for pictures of another kind"
            )
        found: list[int] = []
        kept: list[int] = []
        before = 0
        for place, picture in zip(places, pictures, strict=True):
            shown = self._shown(picture)
            found += [*tokens[before:place], *shown]
            kept += [*mask[before:place], *[0] * len(shown)]
            before = place + 1
        return [*found, *tokens[before:]], [*kept, *mask[before:]]

    def _shown(self, picture: Picture) -> list[int]:
        """What stands for a picture in a sequence."""
        if not picture.video:
            tokens = [self.image_token_id] * self.num_tokens(picture)
            return (
                tokens
                if self.around is None or self.timestamps
                else [self.around[0], *tokens, self.around[1]]
            )
        tokens = [self.video_token_id] * self.num_tokens(picture)
        if not self.timestamps:
            return tokens
        assert self.encode is not None, "a reader of pictures has a tokenizer"
        assert self.around is not None, "their times are before them"
        step = [self.around[0], *tokens[: len(tokens) // picture.grid[0]], self.around[1]]
        # As transformers does it from 5.10 on, within the tokens that templates have about a video.
        return [token for time in picture.times for token in [*self.encode(f"<{time:.1f} seconds>"), *step]]

    def end_of_whole(self, tokens: Sequence[int], pictures: Sequence[Picture], limit: int) -> int:
        """Where at most `limit` of more tokens end if no picture is cut through."""
        row = np.asarray(tokens[:limit])
        seen = np.cumsum(self._is_visual(row))
        whole = np.isin(seen, np.cumsum([0, *(self.num_tokens(picture) for picture in pictures)]))
        return int(np.flatnonzero(whole).max(initial=-1)) + 1

    def _is_visual(self, row: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (row == self.image_token_id) | (row == self.video_token_id)

    def vision_of(self, tokens: Sequence[int], pictures: Sequence[Picture]) -> Vision | None:
        """What a sequence shows, of `pictures` in the order of their tokens those that it has tokens for.

        None where it shows nothing. Raises BasculeError where tokens are left, or are for a part of a picture.
        """
        row = np.asarray(tokens)
        visual_T = self._is_visual(row)
        ends = np.cumsum([0, *(self.num_tokens(picture) for picture in pictures)])
        found = int(visual_T.sum())
        if found not in ends:
            raise BasculeError(
                f"{len(pictures)} pictures have {ends[-1]} features, the sequence has {found} tokens for them"
            )
        if not found:
            return None
        shown = tuple(pictures[: ends.tolist().index(found)])
        grids, intervals = self._grids(shown)
        in_a_row = np.tile(np.arange(row.size), (3, 1))
        return Vision(
            pictures=shown,
            slots_T=int_row(np.where(visual_T, np.cumsum(visual_T), 0)),
            positions_3T=int_row(in_a_row if self.in_a_row else positions_of(~visual_T, grids, intervals)),
        )

    def _grids(self, pictures: Sequence[Picture]) -> tuple[list[tuple[int, int, int]], list[float]]:
        """Grids of tokens that count positions of their own, and how far apart their frames are."""
        grids: list[tuple[int, int, int]] = []
        intervals: list[float] = []
        for picture in pictures:
            time, height, width = picture.grid
            frames = time if picture.video and self.timestamps else 1
            grids += [(time // frames, height // self.merge, width // self.merge)] * frames
            timed = picture.video and self.tokens_per_second is not None
            intervals += [(self.tokens_per_second or 1) * picture.seconds if timed else 1.0] * frames
        return grids, intervals


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


def followed(vision: Vision | None, length: int) -> Vision | None:
    """What a sequence of `length` tokens shows that goes on with text; tokens of pictures are such as well.

    Positions count on from the largest one, as in vLLM and in transformers' `generate`.
    """
    if vision is None:
        return None
    more = length - vision.slots_T.size
    after = int(vision.positions_3T.max()) + 1 + np.arange(more)
    return Vision(
        pictures=vision.pictures,
        slots_T=int_row(np.concatenate([vision.slots_T, np.zeros(more)])),
        positions_3T=int_row(np.concatenate([vision.positions_3T, np.tile(after, (3, 1))], axis=1)),
    )


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
