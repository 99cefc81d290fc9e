"""The files of a run directory as one thing that grows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from actors.viewer.lines import JsonLines
from actors.viewer.rollouts import RolloutIndex
from configs.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """The values of one metric, None where there was no number."""

    steps: list[int] = field(default_factory=list[int])
    values: list[float | None] = field(default_factory=list[float | None])


class ViewedRun:
    """A run as far as its files went at the last `refresh`. Old runs have no events and no tokens.

    `generation` grows when the run was replaced by another in the same directory.
    """

    def __init__(self, directory: Path) -> None:
        """Reads nothing yet. Raises ConfigError when it is no directory of a run."""
        if not directory.is_dir():
            what = "is a file" if directory.exists() else "does not exist"
            raise ConfigError(f"{directory}: {what}; give the output_dir of a run, a directory")
        if not (directory / "metrics.jsonl").is_file():
            raise ConfigError(
                f"{directory}: there is no metrics.jsonl in it; give the output_dir of a run that has begun"
            )
        self.directory = directory.resolve()
        self.generation = 0
        self._begin()

    def _begin(self) -> None:
        self._metrics = JsonLines(self.directory / "metrics.jsonl")
        self._events = JsonLines(self.directory / "events.jsonl")
        self.rollouts = RolloutIndex(self.directory)
        self.series: dict[str, Series] = {}
        self.events: list[dict[str, Any]] = []
        self.num_rows = self.last_step = 0

    @property
    def _files(self) -> tuple[JsonLines, ...]:
        return (self._metrics, self._events, *self.rollouts.files)

    def refresh(self) -> None:
        """Take in what was added to the files. Raises ConfigError when they cannot be read."""
        try:
            if any(file.is_replaced() for file in self._files):
                self.generation += 1
                self._begin()
            self._read()
        except OSError as error:
            raise ConfigError(f"{self.directory}: its files cannot be read: {error}") from error

    def _read(self) -> None:
        for line in self._metrics.new():
            step = line.row["step"]
            self.num_rows += 1
            self.last_step = max(self.last_step, step)
            for name, value in line.row.items():
                if name != "step" and (value is None or isinstance(value, int | float)):
                    series = self.series.setdefault(name, Series())
                    series.steps.append(step)
                    series.values.append(value)
        self.events += [dict(line.row) for line in self._events.new()]
        self.rollouts.refresh()

    def state(self) -> dict[str, Any]:
        """Everything but values of metrics and completions: what there is, and how much."""
        rollouts, config = self.rollouts, self._config()
        changed = datetime.fromtimestamp((self.directory / "metrics.jsonl").stat().st_mtime, UTC)
        return {
            "generation": self.generation,
            "name": self.directory.name,
            "directory": str(self.directory),
            "algorithm": config.get("algorithm"),
            "model": (config.get("model") or {}).get("model")
            or (config.get("model") or {}).get("mcore_model"),
            "max_steps": config.get("max_steps"),
            "last_step": self.last_step,
            "status": self._status(),
            "changed": changed.isoformat(timespec="seconds"),
            "names": list(self.series),
            "num_rows": self.num_rows,
            "num_rollouts": len(rollouts.entries),
            "num_groups": len(rollouts.groups),
            "functions": list(rollouts.functions),
            "finishes": list(rollouts.finishes),
            "splits": list(rollouts.splits),
            "token_steps": list(rollouts.token_steps),
            "events": self.events,
            "unreadable": sum(file.unreadable for file in self._files),
        }

    def values(self, names: Sequence[str], skip: Sequence[int]) -> list[dict[str, Any]]:
        """Of each metric the steps and values after the first so many."""
        found: list[dict[str, Any]] = []
        for name, first in zip(names, skip, strict=True):
            series = self.series.get(name, Series())
            found.append({"name": name, "steps": series.steps[first:], "values": series.values[first:]})
        return found

    def _status(self) -> str:
        ends = [event for event in self.events if event.get("kind") == "end"]
        outcome = ends[-1].get("outcome") if ends else None
        if outcome in ("failed", "interrupted"):
            return outcome
        return "finished" if (self.directory / "result.json").is_file() else "in progress"

    def _config(self) -> dict[str, Any]:
        """What is in config.yaml, nothing where it cannot be read: it only names things."""
        try:
            found = yaml.safe_load((self.directory / "config.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return found if isinstance(found, dict) else {}
