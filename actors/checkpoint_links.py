"""Links in a run directory: `last` to its newest checkpoint, `best` to the one that was evaluated best."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.events import Event, unheard


class CheckpointLinks:
    """Keeps the links of one run. They are relative, so that the directory can be moved."""

    def __init__(self, directory: Path, event: Event = unheard) -> None:
        """`directory` is the run's; `event` is told what is saved and what is best."""
        self._directory = directory
        self._event = event
        self._best: int | None = None
        self._saved: dict[int, Path] = {}
        self._scores: dict[int, float] = {}

    def saved(self, step: int, checkpoint: Path) -> None:
        """The checkpoint of this step is complete."""
        self._saved[step] = checkpoint
        self._link("last", checkpoint)
        self._event(step, "checkpoint", f"{checkpoint.name} saved", path=checkpoint.name)
        self._link_best()

    def rated(self, step: int, score: float) -> None:
        """How good the weights of this step are, the more the better; they need not be saved (yet). NaN is no
        score: it compares with nothing, and would stay the best where it came first."""
        if not math.isnan(score):
            self._scores[step] = score
            self._link_best()

    @property
    def scores(self) -> Mapping[int, float]:
        """How good the weights were, by step."""
        return self._scores

    def best_step(self) -> int | None:
        """The step whose weights were the best so far, saved or not; the earliest of equals."""
        return max(sorted(self._scores), key=self._scores.__getitem__, default=None)

    def state(self) -> dict[str, Any]:
        """What was saved and how it was rated, for `restore`; JSON takes it."""
        return {
            "saved": {str(step): path.name for step, path in self._saved.items()},
            "scores": {str(step): score for step, score in self._scores.items()},
            "best": self._best,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` told, as far as the checkpoints are still there."""
        saved = {int(step): self._directory / name for step, name in state["saved"].items()}
        self._saved = {step: path for step, path in saved.items() if path.is_dir()}
        self._scores = {int(step): score for step, score in state["scores"].items()}
        self._best = state["best"]

    def _link_best(self) -> None:
        both = self._saved.keys() & self._scores.keys()
        if both:
            # The earliest of equals has trained least.
            best = max(sorted(both), key=self._scores.__getitem__)
            self._link("best", self._saved[best])
            if best != self._best:
                self._best, name = best, self._saved[best].name
                self._event(best, "best", f"{name} is the best so far", path=name, score=self._scores[best])

    def _link(self, name: str, checkpoint: Path) -> None:
        # A rename replaces the old link at once; there is no moment without one.
        new = self._directory / f".{name}.new"
        new.unlink(missing_ok=True)
        new.symlink_to(checkpoint.relative_to(self._directory))
        os.replace(new, self._directory / name)  # noqa: PTH105
