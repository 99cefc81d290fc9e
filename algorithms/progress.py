"""How far a loop has come, so that a run that was cut off can go on after it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a loop carries from one step to the next, besides weights and data."""

    step: int = 0
    """The last step that is done."""
    version: int = 0
    """Of the weights that engines had, or would have had, at its end."""
    empty: int = 0
    """Steps in a row, up to this one, that trained nothing."""
    best: float = float("inf")
    """The lowest held-out loss so far, where that is measured."""


class Keeper(Protocol):
    """Keeps states of a run."""

    @property
    def start(self) -> Progress:
        """After which step the loop begins; everybody it talks to is in that state already."""
        ...

    def keep(self, progress: Progress) -> None:
        """A step is done, with all that is recorded of it; a state of it is written if one is due."""
        ...


class Forgetful:
    """For loops that begin at the beginning and keep nothing."""

    start = Progress()

    def keep(self, progress: Progress) -> None:
        """Nothing is written."""
