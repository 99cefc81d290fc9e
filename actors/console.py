"""Where a person reads along."""

from typing import Protocol


class Console(Protocol):
    """Where a person reads along."""

    def line(self, text: str) -> None:
        """Show a line."""
        ...

    def progress(self, done: int, total: int) -> None:
        """Show how far the run is."""
        ...
