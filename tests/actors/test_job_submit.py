"""`ray job submit` to a real head on this machine: the submitted folder's code runs, with the same outcome."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.transport.gloo import free_port
from tests.actors.run_helpers import ROOT, make_workspace, rows

pytestmark = pytest.mark.e2e

# Both ends must agree; without a word a head wants a token that a client may not find.
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def dashboard() -> Iterator[str]:
    """A head with a dashboard on loopback, in a folder of its own; ended by its own process."""
    import requests

    folder = tempfile.mkdtemp(prefix="h")
    port = free_port("127.0.0.1")
    address = f"http://127.0.0.1:{port}"
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus", "4", "--temp-dir", folder),
            *("--node-ip-address", "127.0.0.1", "--port", str(free_port("127.0.0.1"))),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(port)),
            *(
                "--dashboard-agent-listen-port",
                str(free_port("127.0.0.1")),
                "--ray-client-server-port",
                str(free_port("127.0.0.1")),
            ),
        ],
        env=os.environ | AUTH | {"RAY_raylet_start_wait_time_s": "180"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert head.poll() is None, head.communicate()[0]
            assert time.monotonic() < deadline, "the dashboard does not answer"
            try:
                requests.get(f"{address}/api/version", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield address
    finally:
        head.terminate()
        head.communicate(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job_trains_and_saves(dashboard: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    workspace = make_workspace(tmp_path)
    submitted = subprocess.run(
        [
            *(RAY, "job", "submit", "--address", dashboard, "--working-dir", ".", "--"),
            *(sys.executable, "-m", "actors.cli", "grpo", "--config", str(workspace / "grpo.yaml")),
        ],
        cwd=ROOT,
        env=os.environ | AUTH,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "result: {" in submitted.stdout
    steps = [row for row in rows(workspace / "grpo" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["sampling/logprob_difference_mean"] < 1e-5 for row in steps)
    AutoModelForCausalLM.from_pretrained(workspace / "grpo" / "checkpoint")
