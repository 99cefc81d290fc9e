"""What Prometheus reads: the table, its page, the dashboard, and what comes of the rows of a run."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from actors.metric_table import METRICS
from actors.prometheus import Prometheus

ROOT = Path(__file__).parents[2]
BOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/bascule.json").read_text())
# Deliberately in no panel: its trend is in the steps, and the curves are TensorBoard's.
NOT_SHOWN: set[str] = set()


def queries(value: Any) -> list[str]:
    """Every PromQL expression in the dashboard."""
    if isinstance(value, dict):
        own = [value[key] for key in ("expr", "definition") if isinstance(value.get(key), str)]
        return [*own, *(each for item in value.values() for each in queries(item))]
    return [each for item in value for each in queries(item)] if isinstance(value, list) else []


def test_the_dashboard_asks_for_metrics_that_there_are_and_for_all_of_them() -> None:
    asked = {name for query in queries(BOARD) for name in re.findall(r"\bray_\w+", query)}
    assert asked == {each.exported for each in METRICS} - NOT_SHOWN


def test_a_query_uses_labels_that_its_metrics_have() -> None:
    labels = {each.exported: {*each.labels} for each in METRICS}
    for query in queries(BOARD):
        (name,) = {*re.findall(r"\bray_\w+", query)}
        used = {label for found in re.findall(r"by \(([^)]*)\)", query) for label in found.split(", ")}
        used |= {*re.findall(r"(\w+)!?=", query)}
        assert used <= labels[name], query
        # A driver that was started again has series of its own.
        assert query.startswith("label_values(") or " by (run" in query, query


def test_counters_are_read_as_rates_and_gauges_are_not() -> None:
    counters = {each.exported for each in METRICS if each.kind == "counter"}
    for query in queries(BOARD):
        for name in re.findall(r"\bray_\w+", query):
            if name != "ray_bascule_events_total":
                assert ("rate(" in query) == (name in counters), query


def test_panels_have_places_of_their_own_in_the_rows_that_an_operator_looks_for() -> None:
    panels = BOARD["panels"]
    assert [each["title"] for each in panels if each["type"] == "row"] == [
        "Progress", "Throughput and where the time goes", "Weights", "Engines and faults", "Rewards",
    ]  # fmt: skip
    assert len({each["id"] for each in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for each in panels:
        place = each["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, each["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if each["type"] != "row":
            assert each["datasource"]["uid"] == "${datasource}"
            assert [target["refId"] for target in each["targets"]] == list("ABCDE")[: len(each["targets"])]
    assert {each["name"] for each in BOARD["templating"]["list"]} >= {"datasource", "run"}


def test_the_page_lists_every_metric_with_its_labels() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    listed = re.findall(r"^\| `(ray_bascule_\w+)` \| ([^|]*) \| ([^|]*) \| (.*) \|$", page, re.M)
    own = {each.exported: each for each in METRICS}
    assert [name for name, *_ in listed] == [each.exported for each in METRICS]
    for name, labels, unit, text in listed:
        assert labels.strip() == (own[name].label or "")
        assert unit.strip() == own[name].unit
        assert text.strip() == own[name].text


def test_sources_are_names_of_metrics_jsonl() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    for each in METRICS:
        name = each.source.replace("*", "NAME" if each.source.startswith("rewards/") else "")
        if not each.source.startswith(("@", "step", "sync/", "time/")):
            assert f"`{name}`" in page, each.source


class Fake:
    """A metric of Ray: what it was told last, or in all."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self.name, self.tag_keys = name, tag_keys
        self.defaults: dict[str, str] = {}
        self.values: dict[tuple[str, ...], float] = {}

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.defaults = tags

    def _key(self, tags: dict[str, str] | None) -> tuple[str, ...]:
        known = self.defaults | (tags or {})
        return tuple(known[key] for key in self.tag_keys)

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[self._key(tags)] = value

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0
        self.values[self._key(tags)] = self.values.get(self._key(tags), 0.0) + value


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    found: dict[str, Fake] = {}

    def make(name: str, description: str, tag_keys: tuple[str, ...]) -> Fake:
        return found.setdefault(name, Fake(name, description, tag_keys))

    monkeypatch.setattr("ray.util.metrics.Gauge", make)
    monkeypatch.setattr("ray.util.metrics.Counter", make)
    return found


def test_rows_become_values_by_label_and_counters_grow(
    made: dict[str, Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Prometheus(run="r", algorithm="grpo", max_steps=9)
    monkeypatch.setattr("actors.prometheus._AGAIN_S", 0.2)
    sink.event("start")
    sink.open(None)
    row = {
        "step": 3, "loss": 0.5, "reward": float("nan"), "samples": 8.0, "time/step": 2.0, "time/train": 1.5,
        "rewards/a_b/mean": 0.25, "rewards/a_b/error_ratio": 0.0, "rewards/a_b/part": 7.0, "sync/bytes": 10.0,
        "sync/seconds": 0.5, "sync/pause_seconds": 0.1, "sync/version": 2.0,
    }  # fmt: skip
    sink.phase("train", begins=True)
    sink.waiting("train step", ["trainer rank 0"], 4.0)
    sink.row(row)
    sink.row(row | {"step": 4})
    sink.row({"step": 4, "eval/accuracy": 0.75})
    sink.event("restart")
    own = ("r", "grpo")
    assert made["bascule_step"].values == {own: 4.0}
    assert made["bascule_max_steps"].values == {own: 9.0}
    assert made["bascule_loss"].values == {own: 0.5}
    assert made["bascule_reward"].values == {}
    assert made["bascule_samples"].values == {own: 16.0}
    assert made["bascule_phase_seconds"].values == {(*own, "step"): 2.0, (*own, "train"): 1.5}
    assert made["bascule_phase"].values == {(*own, "train"): 1.0}
    assert made["bascule_reward_function"].values == {(*own, "a_b"): 0.25}
    assert made["bascule_reward_error_ratio"].values == {(*own, "a_b"): 0.0}
    assert made["bascule_sync_bytes"].values == {own: 20.0}
    assert made["bascule_sync_part_seconds"].values == {(*own, "pause"): 0.1}
    assert made["bascule_weight_version"].values == {own: 2.0}
    assert made["bascule_eval_accuracy"].values == {own: 0.75}
    assert made["bascule_restarts"].values == {own: 1.0}
    assert made["bascule_events"].values == {(*own, "restart"): 1.0}
    assert made["bascule_wait_seconds"].values == {own: 0.0}
    # Ray forgets what is not set again.
    for each in made.values():
        each.values.clear()
    deadline = time.monotonic() + 30
    while not made["bascule_wait_seconds"].values and time.monotonic() < deadline:
        time.sleep(0.02)
    sink.close("ended")
    assert made["bascule_loss"].values == {own: 0.5}
    assert made["bascule_max_steps"].values == {own: 9.0}
    assert made["bascule_samples"].values == {}
    assert set(made) == {each.name for each in METRICS}
