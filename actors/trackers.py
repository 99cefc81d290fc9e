"""W&B and MLflow, for runs that ask for them. Nothing here is imported by others, nor reaches out."""

import importlib.util
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Queue
from typing import Any

from actors.cluster import address_of
from actors.prometheus import Prometheus
from actors.sinks import TRACKERS, Sink
from configs.errors import BasculeError, ConfigError
from configs.record import RecordConfig
from configs.schema import RunConfig

# What a tracker may take to end, which comes on top of the run.
_END_S = 60.0
# Of MLflow's servers.
_MOST_PARAMS, _LONGEST_PARAM = 100, 500
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}


def sinks_of(config: RunConfig, directory: Path) -> list[Sink]:
    """All that the run is to tell of its numbers besides TensorBoard."""
    record = config.record
    name = record.run_name or directory.name
    sinks: list[Sink] = []
    if record.prometheus and address_of(config.cluster) is not None:
        sinks.append(Prometheus(run=name, algorithm=config.algorithm, max_steps=config.max_steps))
    kinds = {"wandb": Wandb, "mlflow": MLflow}
    shown = config.model_dump(mode="json")
    return [*sinks, *(kinds[each](directory, record.project, name, shown) for each in record.report_to)]


def check_trackers(record: RecordConfig) -> None:
    """Raises ConfigError for one that is asked for and cannot be. Only W&B, unless offline, asks its server."""
    for each in record.report_to:
        if importlib.util.find_spec(_PACKAGES[each]) is None:
            raise ConfigError(
                f"record.report_to: {each} is not installed in this environment; run `pip install "
                f"{_PACKAGES[each]}` (or this project with its extra `trackers`), or leave it out"
            )
    if "wandb" in record.report_to:
        _check_wandb()


def _check_wandb() -> None:
    import wandb

    if wandb.setup().settings.mode != "online":
        return
    try:
        has_key = wandb.login(prompt=False)
    except Exception as error:
        raise ConfigError(f"record.report_to: wandb takes no runs: {error}") from error
    if not has_key:
        raise ConfigError(
            "record.report_to: wandb has no key for its server; set WANDB_API_KEY, or WANDB_MODE=offline, which "
            "writes into the run directory what `wandb sync` can send later"
        )


class _Remembered:
    """What a tracker calls the run, so that one that goes on is the same."""

    def __init__(self, directory: Path, tracker: str) -> None:
        self._path = directory / TRACKERS
        self._tracker = tracker
        self._written: str | None = None

    def read(self) -> str | None:
        """None for a run that it does not know."""
        return self._all().get(self._tracker)

    def write(self, value: str) -> None:
        """From now on. Not before the first row: until then a run that is there already is not replaced."""
        if self._written == value:
            return
        self._written = value
        self._path.write_text(json.dumps(self._all() | {self._tracker: value}) + "\n")

    def _all(self) -> dict[str, str]:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}


class Wandb(Sink):
    """A run of Weights & Biases. WANDB_MODE, WANDB_ENTITY, WANDB_BASE_URL and the like are its own."""

    name = "W&B"

    def __init__(self, directory: Path, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        self._directory, self._project, self._run_name, self._config = directory, project, run_name, config
        self._remembered = _Remembered(directory, "wandb")

    def open(self, step: int | None) -> None:
        """Begin it, or go on with it. Raises BasculeError: somebody asked for it."""
        import wandb

        run_id = self._remembered.read() if step is not None else None
        settings = wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True)
        try:
            self._run = wandb.init(
                project=self._project,
                name=self._run_name,
                id=run_id or uuid.uuid4().hex[:8],
                resume="allow",
                dir=str(self._directory),
                config=dict(self._config),
                settings=settings,
            )
            # Not W&B's own count of rows: after a loss steps are done again, and evaluations are rows as well.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            raise BasculeError(f"record.report_to: wandb does not begin a run: {error}") from error

    def row(self, row: Mapping[str, float]) -> None:
        """All of it, under the names of metrics.jsonl."""
        self._remembered.write(self._run.id)
        self._run.log(_finite(row))

    def close(self, outcome: str) -> None:
        """Send what is left."""
        run, code = self._run, 0 if outcome == "ended" else 1
        _Background("wandb").finish(lambda: run.finish(exit_code=code), _END_S)


class MLflow(Sink):
    """A run of MLflow, at MLFLOW_TRACKING_URI, or in mlflow.db in the run directory."""

    name = "MLflow"

    def __init__(self, directory: Path, project: str, run_name: str, config: Mapping[str, Any]) -> None:
        self._directory, self._project, self._run_name, self._config = directory, project, run_name, config
        self._remembered = _Remembered(directory, "mlflow")
        # A server that does not answer is asked again for minutes, for which no step waits.
        self._background = _Background("mlflow")

    def open(self, step: int | None) -> None:
        """Begin it, or go on with it. Raises BasculeError: somebody asked for it."""
        try:
            from mlflow import MlflowClient

            uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self._directory / 'mlflow.db'}"
            self._client = MlflowClient(uri)
            known = self._remembered.read() if step is not None else None
            if known is None:
                known = self._begin()
            else:
                self._client.set_terminated(known, "RUNNING")
            self._id = known
        except Exception as error:
            raise BasculeError(f"record.report_to: mlflow does not begin a run: {error}") from error

    def _begin(self) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self._project
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        run_id = self._client.create_run(experiment, run_name=self._run_name).info.run_id
        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in _flat(self._config)]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + _MOST_PARAMS])
        return run_id

    def row(self, row: Mapping[str, float]) -> None:
        """All of it, under the names of metrics.jsonl. Raises what went wrong with an earlier one."""
        from mlflow.entities import Metric

        self._remembered.write(self._id)
        now, step = int(time.time() * 1000), int(row["step"])
        metrics = [Metric(name, value, now, step) for name, value in _finite(row).items() if name != "step"]
        self._background.do(lambda: self._client.log_batch(self._id, metrics))

    def close(self, outcome: str) -> None:
        """Send what is left."""
        status = {"ended": "FINISHED", "failed": "FAILED"}.get(outcome, "KILLED")
        self._background.finish(lambda: self._client.set_terminated(self._id, status), _END_S)


def _finite(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if math.isfinite(value)}


def _flat(config: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Leaves by their dotted names, without those that are not set."""
    leaves: list[tuple[str, Any]] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            leaves += _flat(value, f"{before}{name}.")
        elif value not in (None, [], ()):
            leaves.append((f"{before}{name}", value))
    return leaves


class _Background:
    """Calls, one after the other, in a thread that the end of the process does not wait for."""

    def __init__(self, name: str) -> None:
        self._calls: Queue[Callable[[], Any]] = Queue()
        self._failed: Exception | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def do(self, call: Callable[[], Any]) -> None:
        """Soon. Raises what an earlier call raised."""
        if self._failed is not None:
            raise self._failed
        self._calls.put(call)

    def finish(self, call: Callable[[], Any], seconds: float) -> None:
        """After all others, and wait for it. Raises what any of them raised, and TimeoutError."""
        done = threading.Event()
        self._calls.put(call)
        self._calls.put(done.set)
        if not done.wait(seconds):
            raise TimeoutError(f"did not end within {seconds:.0f} s")
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call()
            except Exception as error:  # noqa: BLE001
                # For the main thread, which is not the one that would wait for a network.
                self._failed = error
