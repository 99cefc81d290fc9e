"""Jobs on a real head on this machine: the submitted folder's code runs, with the same outcome and exit code."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.transport.gloo import free_port
from tests.actors.run_helpers import PROGRAM, ROOT, rows

pytestmark = pytest.mark.e2e

# Both ends must agree; without a word a head wants a token that a client may not find.
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
README = (ROOT / "README.md").read_text()
OUTPUT = "/shared/runs/tiny"
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
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


def make_clone(folder: Path) -> Path:
    """The tracked part of the repository, with the tiny model where `make demo` leaves it after its warm-up."""
    from actors.tiny_model import build_tiny_model, write_arithmetic

    for name in ("actors", "algorithms", "bridge", "configs", ".gitignore", ".rayignore"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    build_tiny_model(folder / "runs/tiny/sft/checkpoint", seed=42)
    write_arithmetic(folder / "runs/tiny/data", seed=42)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clone(tmp_path_factory.mktemp("submitted") / "clone")


def start_submit(clone: Path, dashboard: str, *words: str, token: str = "a" * 64) -> subprocess.Popen[str]:
    """`bascule submit` in the clone."""
    return subprocess.Popen(
        [
            *(sys.executable, "-c", PROGRAM, "submit", "--config", str(ROOT / "configs/sft-tiny.yaml")),
            *(
                "--address",
                dashboard,
                "--python",
                sys.executable,
                "--model",
                "runs/tiny/sft/checkpoint",
                *words,
            ),
        ],
        cwd=clone,
        env=os.environ | AUTH | {"RAY_AUTH_TOKEN": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_command_of_the_readme_trains_and_saves(dashboard: str, clone: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    output = tmp_path / "output"
    command = next(line for line in README.splitlines() if line.startswith("ray job submit"))
    words = command.replace("-- python ", f"-- {sys.executable} ").replace(OUTPUT, str(output))
    submitted = subprocess.run(
        [
            *(RAY, *shlex.split(words)[1:]),
            *("--max_steps", "2", "--eval_size", "20", "--lr_warmup_iters", "0"),
        ],
        cwd=clone,
        env=os.environ | AUTH | {"RAY_ADDRESS": dashboard},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "result: {" in submitted.stdout
    steps = [row for row in rows(output / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert len(rows(output / "rollouts.jsonl")) == 2 * 128 * 4 + 2 * 20
    AutoModelForCausalLM.from_pretrained(output / "checkpoint")


def test_submit_exits_as_the_run_does(dashboard: str, clone: Path, tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path / "run"), "--job", "one", "--dataset", "none of these.jsonl"]
    job = start_submit(clone, dashboard, *words)
    out = job.communicate(timeout=200)[0]
    # Ray's own command line would exit with 1.
    assert job.returncode == 2, out
    assert f"job one at {dashboard}" in out
    assert "error: none of these.jsonl: this dataset cannot be read" in out
    again = start_submit(clone, dashboard, *words)
    out = again.communicate(timeout=60)[0]
    assert again.returncode == 1
    assert "did not take the job" in out
    assert "one already exists" in out
    denied = start_submit(clone, dashboard, *words, token="b" * 64)
    out = denied.communicate(timeout=60)[0]
    assert denied.returncode == 1
    assert "does not answer as a Ray dashboard" in out
    assert "token" in out


def test_ctrl_c_stops_the_job(dashboard: str, clone: Path, tmp_path: Path) -> None:
    job = start_submit(clone, dashboard, "--output_dir", str(tmp_path / "run"), "--max_steps", "100000")
    assert job.stdout is not None
    seen = ""
    while "step      3/" not in seen:
        line = job.stdout.readline()
        assert line, seen
        seen += line
    job.send_signal(signal.SIGINT)
    out = job.communicate(timeout=120)[0]
    assert job.returncode == 130, seen + out
    assert "stopping job" in out
    assert "was stopped" in out
    # Ray gives it the time to save.
    (saved,) = re.findall(r"SIGTERM: ended after step (\d+); started again it goes on after step \1\n", out)
    assert (tmp_path / "run" / "resume" / f"step-{saved}" / "manifest.json").is_file()
