"""An endless, resumable order over prompts or samples."""

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

from configs.errors import BasculeError

T = TypeVar("T")


class PromptStream(Generic[T]):
    """Draws items epoch after epoch; no item comes twice in one epoch.

    The order of an epoch depends on `seed` and its number only, so epoch and offset are the whole state.
    """

    def __init__(self, prompts: Sequence[T], *, seed: int, shuffle: bool) -> None:
        if not prompts:
            raise BasculeError("the prompt stream has nothing to draw from; the dataset is empty")
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._epoch, self._offset = 0, 0
        self._order = self._permutation(0)

    @property
    def items(self) -> Sequence[T]:
        """All that is drawn from, in the order of the data set."""
        return self._prompts

    def take(self, n: int) -> list[T]:
        """The next `n` items; a draw goes on into the next epoch where one ends."""
        taken: list[T] = []
        while len(taken) < n:
            part = self._order[self._offset : self._offset + n - len(taken)]
            taken.extend(self._prompts[index] for index in part)
            self._offset += len(part)
            if self._offset == len(self._prompts):
                self._epoch, self._offset = self._epoch + 1, 0
                self._order = self._permutation(self._epoch)
        return taken

    def state(self) -> dict[str, int]:
        """`epoch` and `offset` (items drawn in it) of the next draw."""
        return {"epoch": self._epoch, "offset": self._offset}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on after the draw at which `state` was taken, given the same items, seed and shuffle.

        Raises BasculeError when there are fewer items than were drawn.
        """
        if state["offset"] >= len(self._prompts):
            raise BasculeError(
                f"the saved position is item {state['offset']} of an epoch, but the dataset has "
                f"{len(self._prompts)} rows; resume with the dataset that the run was started with"
            )
        self._epoch, self._offset = state["epoch"], state["offset"]
        self._order = self._permutation(self._epoch)

    def _permutation(self, epoch: int) -> list[int]:
        size = len(self._prompts)
        if not self._shuffle:
            return list(range(size))
        return np.random.default_rng((self._seed, epoch)).permutation(size).tolist()
