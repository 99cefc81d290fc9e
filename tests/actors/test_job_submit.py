"""Jobs on a real cluster of two nodes on this machine, with token authentication: the submitted folder's code
runs, with the same outcome and exit code, and its metrics are served."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from actors.metric_table import METRICS
from bridge.transport.gloo import free_port
from tests.actors.run_helpers import PROGRAM, ROOT, rows
from tests.actors.trace_helpers import read_trace

pytestmark = pytest.mark.e2e

# Both ends must agree; without a word a head wants a token that a client may not find.
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
README = (ROOT / "README.md").read_text()
OUTPUT = "/shared/runs/tiny"
LABEL, OTHER_LABEL = "bascule-role", "other-role"
OURS = ("run", "algorithm", *{each.label for each in METRICS if each.label is not None})
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """A cluster of two nodes: its dashboard, and the metrics of the node on which drivers run."""

    address: str
    dashboard: str
    metrics: str

    def get(self, path: str) -> Any:
        """The answer of the dashboard, with the token."""
        header = {"Authorization": f"Bearer {AUTH['RAY_AUTH_TOKEN']}"}
        answer = requests.get(f"{self.dashboard}{path}", headers=header, timeout=30)
        answer.raise_for_status()
        return answer.json()


def start_node(*words: str, role: str) -> subprocess.Popen[str]:
    """A node of its own, although on this machine, for trainers or for engines."""
    ports = [str(free_port("127.0.0.1")) for _ in range(2)]
    return subprocess.Popen(
        [
            *(RAY, "start", "--block", "--num-cpus", "4", *words),
            *("--labels", f"{LABEL}={role},{OTHER_LABEL}={'trainer' if role == 'rollout' else 'none'}"),
            *("--dashboard-agent-listen-port", ports[0], "--ray-client-server-port", ports[1]),
        ],
        env=os.environ | AUTH | {"RAY_raylet_start_wait_time_s": "180"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(ready: Callable[[], bool], node: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert node.poll() is None, node.communicate()[0]
        assert time.monotonic() < deadline, what
        try:
            if ready():
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Two nodes with a dashboard on loopback, in folders of their own; ended by their own processes."""
    # In one folder they would unpack what is submitted over each other.
    folders = [tempfile.mkdtemp(prefix="h") for _ in range(2)]
    gcs, dashboard, metrics = (free_port("127.0.0.1") for _ in range(3))
    found = Head(
        address=f"127.0.0.1:{gcs}",
        dashboard=f"http://127.0.0.1:{dashboard}",
        metrics=f"http://127.0.0.1:{metrics}/metrics",
    )
    node_ip = ("--node-ip-address", "127.0.0.1")
    nodes = [
        start_node(
            *("--head", "--temp-dir", folders[0], *node_ip, "--port", str(gcs)),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            *("--metrics-export-port", str(metrics)),
            role="trainer",
        )
    ]
    try:
        wait_for(lambda: bool(found.get("/api/version")), nodes[0], "the dashboard does not answer")
        nodes.append(
            start_node(*("--address", found.address, "--temp-dir", folders[1], *node_ip), role="rollout")
        )
        wait_for(lambda: len(roles_of_nodes(found)) == 2, nodes[1], "the second node does not join")
        yield found
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.communicate(timeout=60)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def roles_of_nodes(head: Head) -> dict[str, str]:
    """Of each node by its id."""
    nodes = head.get("/api/v0/nodes?detail=true")["data"]["result"]["result"]
    return {node["node_id"]: node["labels"][LABEL] for node in nodes if node["state"] == "ALIVE"}


def roles_of_actors(head: Head) -> dict[str, set[str]]:
    """On the nodes of which roles actors of each kind were, those that have ended included."""
    nodes, found = roles_of_nodes(head), defaultdict[str, set[str]](set)
    for actor in head.get("/api/v0/actors?limit=1000&detail=true")["data"]["result"]["result"]:
        found[actor["class_name"]].add(nodes[actor["node_id"]])
    return found


def scrape(head: Head) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Values of our metrics by name, and by the labels that are ours."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(dict)
    # Without a token: docs/security.md.
    for line in requests.get(head.metrics, timeout=30).text.splitlines():
        match = re.fullmatch(r"(ray_bascule_\w+){(.*)} (\S+)", line)
        if match:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            ours = {name: labels[name] for name in OURS if name in labels}
            found[match[1]][tuple(ours.items())] = float(match[3])
    return found


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


def start_submit(clone: Path, head: Head, *words: str, token: str = "a" * 64) -> subprocess.Popen[str]:
    """`bascule submit` in the clone."""
    return subprocess.Popen(
        [
            *(sys.executable, "-c", PROGRAM, "submit", "--config", str(ROOT / "configs/sft-tiny.yaml")),
            *(
                "--address",
                head.dashboard,
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


def read_until(job: subprocess.Popen[str], words: str) -> str:
    """What it has printed up to the line with these words."""
    assert job.stdout is not None
    seen = ""
    while words not in seen:
        line = job.stdout.readline()
        assert line, seen
        seen += line
    return seen


def test_the_command_of_the_readme_trains_and_saves(head: Head, clone: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    output = tmp_path / "output"
    command = next(line for line in README.splitlines() if line.startswith("ray job submit"))
    words = command.replace("-- python ", f"-- {sys.executable} ").replace(OUTPUT, str(output))
    with (tmp_path / "log").open("w") as log:
        submitted = subprocess.Popen(
            [
                *(RAY, *shlex.split(words)[1:]),
                *("--max_steps", "3", "--eval_size", "20", "--lr_warmup_iters", "0", "--max_lag", "1"),
                *("--prompts_per_step", "32"),
                *("--node_label", LABEL, "--bridge.placement", "trainer", "--run_name", "of the readme"),
                # A model that has learned nothing may have no group with a signal, and such a step no sync.
                *("--filter_zero_variance", "false"),
            ],
            cwd=clone,
            env=os.environ | AUTH | {"RAY_ADDRESS": head.dashboard},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
    seen: list[dict[str, dict[tuple[tuple[str, str], ...], float]]] = []
    deadline = time.monotonic() + 400
    while submitted.poll() is None and time.monotonic() < deadline:
        now = scrape(head)
        seen += [now] if now.get("ray_bascule_step") else []
        time.sleep(1)
    said = (tmp_path / "log").read_text()
    assert submitted.poll() == 0, said
    assert "result: {" in said
    steps = [row for row in rows(output / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert len(rows(output / "rollouts.jsonl")) == 3 * 32 * 4 + 2 * 20
    AutoModelForCausalLM.from_pretrained(output / "checkpoint")
    check_metrics(seen, steps)
    check_trace(output)
    # Rewards are where completions are; the bridge is in a trainer rank.
    kinds = roles_of_actors(head)
    assert {name: kinds[name] for name in ("TrainerRank", "Engine", "RewardWorker")} == {
        "TrainerRank": {"trainer"}, "Engine": {"rollout"}, "RewardWorker": {"rollout"},
    }  # fmt: skip


def check_metrics(
    seen: list[dict[str, dict[tuple[tuple[str, str], ...], float]]], steps: list[dict[str, float]]
) -> None:
    """What was served is what was written: of the step that was the last one then, and in sum."""
    assert seen, "nothing was served while it ran"
    last, own = seen[-1], (("run", "of the readme"), ("algorithm", "grpo"))
    assert set(last) <= {each.exported for each in METRICS}
    step = int(last["ray_bascule_step"][own])
    row, done = steps[step - 1], steps[:step]
    gauges = {
        "ray_bascule_loss": "loss",
        "ray_bascule_reward": "reward",
        "ray_bascule_weight_version": "sync/version",
        "ray_bascule_weight_lag_max": "sampling/staleness_max",
        "ray_bascule_tokens_per_second": "tokens_per_second",
        "ray_bascule_prompts_running": "engines/running",
        "ray_bascule_step_seconds": "time/step",
    }
    assert {name: last[name][own] for name in gauges} == pytest.approx(
        {name: row[source] for name, source in gauges.items()}
    )
    assert last["ray_bascule_max_steps"][own] == 3
    errors = last["ray_bascule_reward_error_ratio"]
    assert errors == {(*own, ("reward", name)): 0.0 for name in ("exact_match", "closeness")}
    for name, source in (("samples", "samples"), ("tokens", "tokens"), ("sync_bytes", "sync/bytes")):
        total = sum(each[source] for each in done)
        assert last[f"ray_bascule_{name}_total"][own] == pytest.approx(total)
    assert abs(last["ray_bascule_last_step_timestamp_seconds"][own] - time.time()) < 400


def check_trace(output: Path) -> None:
    """Every process is there, and with a lag of one engines begin a step before the last one is trained on."""
    trace = read_trace(output / "trace.json")
    ranks, workers = ("trainer rank 0", "trainer rank 1"), ("reward worker 0", "reward worker 1")
    assert set(trace) == {"driver", *ranks, "engine 0", *workers}
    for step, train in enumerate([span for span in trace[ranks[0]] if span.name == "train"][:2], 1):
        begun = sum(span.name == "generate" and span.begin < train.end for span in trace["engine 0"])
        # Beside those of the evaluation and of the steps so far, of 32 prompts each.
        assert begun > 20 + 32 * step


def test_submit_exits_as_the_run_does(head: Head, clone: Path, tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path / "run"), "--job", "one", "--dataset", "none of these.jsonl"]
    job = start_submit(clone, head, *words)
    out = job.communicate(timeout=200)[0]
    # Ray's own command line would exit with 1.
    assert job.returncode == 2, out
    assert f"job one at {head.dashboard}" in out
    assert "error: none of these.jsonl: this dataset cannot be read" in out
    again = start_submit(clone, head, *words)
    out = again.communicate(timeout=60)[0]
    assert again.returncode == 1
    assert "did not take the job" in out
    assert "one already exists" in out
    denied = start_submit(clone, head, *words, token="b" * 64)
    out = denied.communicate(timeout=60)[0]
    assert denied.returncode == 1
    assert "does not answer as a Ray dashboard" in out
    assert "token" in out


def test_ctrl_c_stops_the_job_and_the_same_command_goes_on(head: Head, clone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = [
        "--output_dir",
        str(output),
        "--data_parallel_size",
        "1",
        "--lr_warmup_iters",
        "0",
        "--max_steps",
    ]
    job = start_submit(clone, head, *words, "100000")
    seen = read_until(job, "step      3/")
    job.send_signal(signal.SIGINT)
    out = job.communicate(timeout=120)[0]
    assert job.returncode == 130, seen + out
    assert "stopping job" in out
    assert "was stopped" in out
    # Ray gives it the time to save.
    (saved,) = re.findall(r"SIGTERM: ended after step (\d+); started again it goes on after step \1\n", out)
    assert (output / "resume" / f"step-{saved}" / "manifest.json").is_file()
    last = int(saved) + 2
    again = start_submit(clone, head, *words, str(last))
    out = again.communicate(timeout=200)[0]
    assert again.returncode == 0, out
    assert [row["step"] for row in rows(output / "metrics.jsonl")] == list(range(1, last + 1))
    (event,) = [row for row in rows(output / "events.jsonl") if row["kind"] == "resume"]
    assert event["step"] == int(saved)
    # One trace of both, as far as it goes back.
    drawn = [
        span.name for span in read_trace(output / "trace.json")["driver"] if span.name.startswith("step")
    ]
    assert drawn[-2:] == [f"step {last - 1}", f"step {last}"]


def test_a_run_on_a_node_that_drains_saves_and_says_so(head: Head, clone: Path, tmp_path: Path) -> None:
    """The last one here: its node leaves the cluster."""
    output = tmp_path / "run"
    words = ["--output_dir", str(output), "--data_parallel_size", "1", "--node_label", OTHER_LABEL]
    job = start_submit(clone, head, *words, "--lr_warmup_iters", "0", "--max_steps", "100000")
    seen = read_until(job, "step      3/")
    (node,) = (id for id, role in roles_of_nodes(head).items() if role == "rollout")
    drained = subprocess.run(
        [
            *(RAY, "drain-node", "--address", head.address, "--node-id", node),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "it is taken away"),
            *("--deadline-remaining-seconds", "100"),
        ],
        env=os.environ | AUTH,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert drained.returncode == 0, drained.stderr
    out = job.communicate(timeout=150)[0]
    assert job.returncode == 75, seen + out
    pattern = rf"node {node[:8]} is draining, \d+ s are left: ended after step (\d+); started again"
    (saved,) = re.findall(pattern, out)
    assert (output / "resume" / f"step-{saved}" / "manifest.json").is_file()
