"""An endless, resumable order over prompts or samples."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from algorithms.data import IntRow
from configs.errors import BasculeError, ConfigError


class OtherDataError(ConfigError):
    """A saved position is beyond the data: they are not those that it was a position in."""


class HasTokens(Protocol):
    """An item of a data set."""

    @property
    def tokens(self) -> IntRow:
        """Its token ids."""
        ...


T = TypeVar("T", bound=HasTokens)
T_co = TypeVar("T_co", covariant=True)


class Stream(Protocol[T_co]):
    """An endless order of items that can be gone on with by another process."""

    def take(self, n: int) -> Sequence[T_co]:
        """The next `n` items."""
        ...

    def digest(self) -> str:
        """Of the data, so that other data are noticed when a run goes on."""
        ...

    def state(self) -> dict[str, int]:
        """`epoch` and `offset` of the next draw."""
        ...

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on after the draw at which `state` was taken. Raises OtherDataError."""
        ...


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
        self._digest: str | None = None

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

    def digest(self) -> str:
        """Of the tokens of all items in their order."""
        if self._digest is None:
            digest = hashlib.sha256()
            for item in self._prompts:
                digest.update(len(item.tokens).to_bytes(8, "little"))
                digest.update(item.tokens.tobytes())
            self._digest = digest.hexdigest()
        return self._digest

    def state(self) -> dict[str, int]:
        """`epoch` and `offset` (items drawn in it) of the next draw."""
        return {"epoch": self._epoch, "offset": self._offset}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on after the draw at which `state` was taken, given the same items, seed and shuffle.

        Raises OtherDataError when there are fewer items than were drawn.
        """
        if state["offset"] >= len(self._prompts):
            raise OtherDataError(
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
