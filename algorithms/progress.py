"""How far a loop has come, so that a run that was cut off can go on after it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from algorithms.data import Group


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """What was sampled of a step ahead of it."""

    step: int
    groups: tuple[Group, ...]


class Ahead(Protocol):
    """What a loop samples ahead of the step that it trains on."""

    def settle(self) -> Sequence[Begun]:
        """Wait until all of it is sampled; returns it, in the order of the steps. It is used all the same."""
        ...


class Keeper(Protocol):
    """Keeps states of a run, and ends it early where it is told to."""

    @property
    def start(self) -> Progress:
        """After which step the loop begins; everybody it talks to is in that state already."""
        ...

    @property
    def begun(self) -> Sequence[Begun]:
        """What had been sampled ahead by then."""
        ...

    def keep(self, progress: Progress, ahead: Ahead | None = None) -> None:
        """A step is done, with all that is recorded of it; a state of it is written if one is due. Raises what
        ends the loop when the run is to end here."""
        ...


class Forgetful:
    """For loops that begin at the beginning and keep nothing."""

    start = Progress()
    begun: Sequence[Begun] = ()

    def keep(self, progress: Progress, ahead: Ahead | None = None) -> None:
        """Nothing is written."""
