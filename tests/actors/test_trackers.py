"""W&B and MLflow, the real packages: offline, and in a file."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.trackers import check_trackers
from configs.errors import ConfigError
from configs.record import RecordConfig

_BLOCK, _FULL, _LAST = 32 << 10, 1, 4
ROOT = Path(__file__).parents[2]
# In a process of its own: both leave threads, and warnings of their own.
PROGRAM = """
import sys
from pathlib import Path
from actors.trackers import MLflow, Wandb
config = {"trainer": {"lr": 0.5, "freeze": []}, "max_steps": 3, "time_limit": None}
for begin, steps, outcome in ((None, (1, 2), "interrupted"), (1, (2, 3), "ended")):
    for kind in (Wandb, MLflow):
        sink = kind(Path(sys.argv[1]), "bascule", "first", config)
        sink.open(begin)
        for step in steps:
            sink.row({"step": step, "loss": 4.0 / step, "kl": float("nan")})
            sink.row({"step": step, "eval/loss": 8.0 / step})
        sink.close(outcome)
"""


def without_settings() -> dict[str, str]:
    """The environment without what either looks for."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW"))}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that was interrupted after step 2, and that went on after step 1."""
    directory = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)],
        cwd=ROOT,
        env=without_settings() | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Neither speaks between the lines of a run.
    assert done.stdout == ""
    return directory


def test_mlflow_has_one_run_with_all_steps_and_the_options(directory: Path) -> None:
    import sqlite3

    with sqlite3.connect(directory / "mlflow.db") as database:
        runs = database.execute("select run_uuid, name, status from runs").fetchall()
        (experiment,) = database.execute("select name from experiments where experiment_id > 0").fetchall()
        params = dict(database.execute("select key, value from params").fetchall())
        points = database.execute("select key, step, value from metrics order by timestamp, step").fetchall()
    assert runs == [(json.loads((directory / "trackers.json").read_text())["mlflow"], "first", "FINISHED")]
    assert experiment == ("bascule",)
    assert params == {"trainer.lr": "0.5", "max_steps": "3"}
    assert {(name, step) for name, step, _ in points} == {
        (name, step) for name in ("loss", "eval/loss") for step in (1, 2, 3)
    }
    assert {(step, value) for name, step, value in points if name == "loss"} == {
        (1, 4.0),
        (2, 2.0),
        (3, 4 / 3),
    }


def records(path: Path) -> list[Any]:
    """The records in a file of W&B: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, data = path.read_bytes(), 7, b""
    found: list[Any] = []
    while place < len(content):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        data += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (_FULL, _LAST):
            found.append(Record.FromString(data))
            data = b""
    return found


def test_wandb_has_one_run_in_two_parts_with_all_steps(directory: Path) -> None:
    name = json.loads((directory / "trackers.json").read_text())["wandb"]
    # Two parts within one second would have one name.
    files = sorted(
        (directory / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime
    )
    assert len(files) == 2
    history: list[dict[str, float]] = []
    for path in files:
        found = records(path)
        (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
        assert (run.run_id, run.project, run.display_name) == (name, "bascule", "first")
        for record in found:
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or item.nested_key[0]: json.loads(item.value_json)
                    for item in record.history.item
                }
                history.append({key: value for key, value in items.items() if not key.startswith("_")})
    assert history == [
        row
        for step in (1, 2, 2, 3)
        for row in ({"step": step, "loss": 4.0 / step}, {"step": step, "eval/loss": 8.0 / step})
    ]


def test_what_has_no_key_is_said_before_anything_starts(tmp_path: Path) -> None:
    program = (
        "from actors.trackers import check_trackers; from configs.record import RecordConfig\n"
        "check_trackers(RecordConfig(report_to=('wandb',)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=without_settings() | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "ConfigError: record.report_to: wandb has no key for its server; set WANDB_API_KEY" in done.stderr


def test_what_is_not_installed_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(RecordConfig())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"record.report_to: mlflow is not installed .*pip install mlflow"):
        check_trackers(RecordConfig(report_to=("mlflow",)))


def test_names_may_be_one_text() -> None:
    assert RecordConfig.model_validate({"report_to": "wandb, mlflow"}).report_to == ("wandb", "mlflow")
    assert RecordConfig.model_validate({"report_to": "none"}).report_to == ()
    with pytest.raises(ValueError, match="names one twice"):
        RecordConfig.model_validate({"report_to": ["mlflow", "mlflow"]})
