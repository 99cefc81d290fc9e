"""When a state is due, and which are kept. No files here."""

import time
from collections.abc import Iterable, Mapping

from configs.checkpoint import CheckpointConfig

# Of `auto`: steps wait for a save at most a twentieth of the time, and the disk is busy half of it.
_SHARE = 20.0
_DISK_SHARE = 2.0


class Schedule:
    """Says after which steps a state is due; learns from what the last one cost."""

    def __init__(self, settings: CheckpointConfig) -> None:
        self._settings = settings
        self._began: float | None = None
        self._blocked_s = 0.0
        self._whole_s = 0.0

    def is_due(self, step: int, *, is_best: bool) -> bool:
        """Whether to write one after this step, whose evaluation may be the best so far."""
        settings = self._settings
        if settings.resume_keep_every and step % settings.resume_keep_every == 0:
            return True
        if settings.resume_keep_best and is_best:
            return True
        if settings.resume_steps == "auto":
            return self._is_cheap()
        return settings.resume_steps > 0 and step % settings.resume_steps == 0

    def began(self, blocked_s: float) -> None:
        """A save has begun, for which the steps waited so long."""
        self._blocked_s = blocked_s
        self._began = time.monotonic() - blocked_s

    def ended(self, whole_s: float) -> None:
        """The save took so long in all."""
        self._whole_s = whole_s

    def _is_cheap(self) -> bool:
        if self._began is None:
            return True
        since = time.monotonic() - self._began
        return since >= _SHARE * self._blocked_s and since >= _DISK_SHARE * self._whole_s


def to_keep(steps: Iterable[int], settings: CheckpointConfig, scores: Mapping[int, float]) -> set[int]:
    """Of the states after these steps those to keep; `scores` are the evaluations' by step, more is better."""
    found = sorted(steps)
    kept = set(found[max(0, len(found) - settings.resume_keep) :])
    if settings.resume_keep_every:
        kept |= {step for step in found if step % settings.resume_keep_every == 0}
    rated = [step for step in found if step in scores]
    if settings.resume_keep_best and rated:
        kept.add(max(rated, key=scores.__getitem__))
    return kept
