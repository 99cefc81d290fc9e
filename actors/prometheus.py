"""A run's numbers as metrics of Ray, which every node serves to Prometheus."""

import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from actors.metric_table import METRICS, Metric
from actors.sinks import Sink

_STEP = "time/step"
_AGAIN_S = 5.0
_END_S = 5.0


class Prometheus(Sink):
    """Sets the metrics of actors.metric_table from what the recorder writes; about 0.01 ms each.

    Ray sends them to the node's agent every ten seconds, and only what was set since; the agent forgets a gauge
    after twenty. So a thread sets all gauges again, as long as the run goes. What is set in its last seconds may
    be lost.
    """

    name = "Prometheus"

    def __init__(self, *, run: str, algorithm: str, max_steps: int) -> None:
        self._labels = {"run": run, "algorithm": algorithm}
        self._max_steps = max_steps
        self._metrics: dict[str, Any] = {}
        self._restarts = 0
        self._gauges: dict[tuple[str, str], float] = {}
        self._over = threading.Event()

    def open(self, step: int | None) -> None:
        """Register all of them; the run must have joined its cluster."""
        from ray.util.metrics import Counter, Gauge

        kinds = {"gauge": Gauge, "counter": Counter}
        for each in METRICS:
            made = kinds[each.kind](each.name, description=each.text, tag_keys=each.labels)
            made.set_default_tags(dict(self._labels))
            self._metrics[each.source] = made
        self._set("@max_steps", float(self._max_steps))
        self._set("@wait", 0.0)
        self._set("@restart", 0.0)
        if step is not None:
            self._set("step", float(step))
        self._refreshing = threading.Thread(target=self._refresh, name="refresh-metrics", daemon=True)
        self._refreshing.start()

    def row(self, row: Mapping[str, float]) -> None:
        """All that a row has; an evaluation's has no step of its own."""
        is_step = _STEP in row
        for each in METRICS:
            if each.source == "step" and not is_step:
                continue
            for value_of_label, value in each.values(row).items():
                self._put(each, value, value_of_label)
        if is_step:
            self._set("@time", time.time())
            self._set("@wait", 0.0)

    def event(self, kind: str) -> None:
        """Count it."""
        self._set("@event", 1.0, kind)
        if kind == "restart":
            self._restarts += 1
            self._set("@restart", float(self._restarts))

    def phase(self, phase: str, *, begins: bool) -> None:
        """Which one the loop is in."""
        self._set("@phase", float(begins), phase)
        if not begins:
            self._set("@wait", 0.0)

    def waiting(self, phase: str, owners: Sequence[str], seconds: float) -> None:
        """Since when."""
        self._set("@wait", seconds)

    def close(self, outcome: str) -> None:
        """Gauges of a run that is over go away."""
        self._over.set()
        self._refreshing.join(_END_S)

    def _refresh(self) -> None:
        while not self._over.wait(_AGAIN_S):
            for (source, value_of_label), value in list(self._gauges.items()):
                self._set(source, value, value_of_label)

    def _set(self, source: str, value: float, value_of_label: str = "") -> None:
        self._put(_BY_SOURCE[source], value, value_of_label)

    def _put(self, metric: Metric, value: float, value_of_label: str = "") -> None:
        if not math.isfinite(value) or not self._metrics:
            return
        tags = None if metric.label is None else {metric.label: value_of_label}
        made = self._metrics[metric.source]
        if metric.kind == "gauge":
            self._gauges[metric.source, value_of_label] = value
            made.set(value, tags)
        elif value > 0:
            made.inc(value, tags)


_BY_SOURCE = {each.source: each for each in METRICS}
