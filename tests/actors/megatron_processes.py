"""How tests of Megatron have their worker scripts run; see megatron_fixtures.py."""

from pathlib import Path
from typing import Any, Protocol


class RunWorkers(Protocol):
    """Runs `script` RANK WORLD_SIZE DIRECTORY for every rank; results by rank.

    A rank writes `directory`/`prefix`RANK.json; what it says is in `prefix`RANK.log. A rank that fails is an
    AssertionError with the end of that.
    """

    def __call__(
        self, script: Path, world_size: int, directory: Path, *, prefix: str = "", timeout_s: float = 240
    ) -> list[dict[str, Any]]: ...


def log_of(directory: Path, rank: int, prefix: str = "") -> Path:
    """The file with what a rank said."""
    return directory / f"{prefix}{rank}.log"
