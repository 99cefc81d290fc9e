"""Rewards in real child processes: what hangs, blocks, exits or dies is ended, and the rest goes on."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from algorithms.data import Verdict
from algorithms.rewards.loading import read_sources
from algorithms.rewards.process import AsyncProcess, RewardRunner
from configs.errors import ConfigError
from configs.rewards import RewardConfig
from tests.algorithms.rewards.groups import group

FUNCTIONS = """
import asyncio, os, re, time

def length(completion):
    return len(completion)

def sleeps(completion):
    time.sleep(60 if completion == "b" else 0)
    return 1

def backtracks(completion):
    return re.fullmatch("(a+)+b", completion) is None

def exits(completion):
    if completion == "b":
        os._exit(3)
    return os.getpid()

async def meets(completion, waiting=[]):
    waiting.append(completion)
    while len(waiting) < 4:
        await asyncio.sleep(0.01)
    return len(waiting)

busy, most = 0, 0

async def counts(completion):
    global busy, most
    busy += 1
    most = max(most, busy)
    await asyncio.sleep(0.02)
    busy -= 1
    return most

async def blocks(completion):
    if completion == "b":
        time.sleep(60)
    return 1

async def whole(group):
    await asyncio.sleep(0.01)
    return [index for index, _ in enumerate(group.rollouts)]
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


@contextmanager
def runner(*names: str, **options: Any) -> Iterator[RewardRunner]:
    configs = [RewardConfig(function=f"f.py:{name}", **options) for name in names]
    with closing(RewardRunner(read_sources(configs), start_timeout_s=60)) as made:
        made.start()
        yield made


def values(verdicts: tuple[Verdict, ...]) -> list[float | None]:
    return [each.value for each in verdicts]


def test_plain_and_async_rewards_of_one_group() -> None:
    with runner("length", "whole") as made:
        found = made.judge(group("a", "bcd"))
    assert {name: values(each) for name, each in found.items()} == {"length": [1, 3], "whole": [0, 1]}
    assert all(0 <= each.seconds < 10 for verdicts in found.values() for each in verdicts)


@pytest.mark.parametrize(("name", "text"), [("sleeps", "b"), ("backtracks", "a" * 64)])
def test_a_call_that_hangs_is_ended_and_the_others_count(name: str, text: str) -> None:
    start = time.monotonic()
    with runner(name, timeout_s=1.0) as made:
        first, late, last = made.judge(group("ac", text, "ac"))[name]
    assert (first.value, last.value) == (1.0, 1.0)
    assert (late.timed_out, late.value) == (True, None)
    expected = f"reward {name}: prompt train-3, completion 1: no answer within 1 s; make the function faster"
    assert str(late.error).startswith(expected)
    assert time.monotonic() - start < 40


def test_a_function_that_ends_its_process_costs_one_call() -> None:
    with runner("exits") as made:
        first, bad, last = made.judge(group("a", "b", "c"))["exits"]
        child = int(last.value or 0)
        assert Path(f"/proc/{child}").exists()
    assert first.value != last.value
    assert "prompt train-3, completion 1: the process ended with exit code 3" in str(bad.error)
    assert not bad.timed_out
    assert not Path(f"/proc/{child}").exists()


def test_async_calls_of_several_groups_run_beside_each_other() -> None:
    with runner("meets", timeout_s=30) as made:
        futures = [made.submit(group("a", "b", name=name), (0, 1), (0,))[0] for name in ("p", "q")]
        assert not wait(futures, timeout=30).not_done
    assert [future.result()[1].value for future in futures] == [4.0, 4.0]


def test_no_more_async_calls_at_once_than_allowed() -> None:
    with runner("counts", max_concurrency=2) as made:
        futures = [made.submit(group("a", "b", "c", name=str(n)), (0, 1, 2), (0,))[0] for n in range(4)]
        found = [verdict.value for future in futures for verdict in future.result(30).values()]
    assert max(found, key=float) == 2.0  # type: ignore[arg-type]


def test_an_event_loop_that_stands_still_is_noticed() -> None:
    sources = read_sources([RewardConfig(function="f.py:blocks", timeout_s=1.0)])
    with closing(AsyncProcess(sources, start_timeout_s=60, blocked_s=2.0)) as made:
        made.start()
        lost = made.submit(0, group("b"), (0,)).result(30)[0]
        assert lost.timed_out
        assert "rewards of prompt train-3: the event loop stood still" in str(lost.error)
        assert made.submit(0, group("a"), (0,)).result(60)[0].value == 1.0


def test_what_is_under_way_when_it_is_closed_ends() -> None:
    made = AsyncProcess(read_sources([RewardConfig(function="f.py:meets", timeout_s=60)]), start_timeout_s=60)
    made.start()
    future = made.submit(0, group("a"), (0,))
    made.close()
    assert future.result(10)[0].error is not None


def test_rewards_that_do_not_load_are_named() -> None:
    runner = RewardRunner(read_sources([RewardConfig(function="f.py:wrong")]), start_timeout_s=60)
    with closing(runner), pytest.raises(ConfigError, match="no function wrong"):
        runner.start()


HOLDER = """
import sys
from algorithms.rewards.loading import read_sources
from algorithms.rewards.process import PlainProcess
from configs.rewards import RewardConfig
from tests.algorithms.rewards.groups import group
process = PlainProcess(read_sources([RewardConfig(function="f.py:backtracks")]), start_timeout_s=60)
process.start()
sys.stdout.write(str(process._child._process.pid) + chr(10))
sys.stdout.flush()
process.do(0, group("a" * 60), (0,))
"""


def test_a_child_in_a_call_dies_with_its_killed_parent() -> None:
    """The call holds the interpreter, so nothing in the child can notice: the kernel has to end it."""
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        child = Path("/proc", holder.stdout.readline().strip())
        time.sleep(1)
        assert child.exists()
        holder.kill()
    deadline = time.monotonic() + 10
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists()


class _Server(BaseHTTPRequestHandler):
    """Rewards a completion with its length, fails for a prompt of no, and for who has not the key."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        allowed = self.headers["Authorization"] == "Bearer sk-2"
        self.send_response(401 if not allowed else 500 if asked["prompt"] == "no" else 200)
        self.end_headers()
        rewards = [{"score": len(text), "about": asked["columns"]["answer"]} for text in asked["completions"]]
        self.wfile.write(json.dumps({"rewards": rewards}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", "sk-2")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/score"
    config = RewardConfig(url=url, api_key_env="JUDGE")
    for other, problem in (
        (None, "401 Unauthorized"),
        ("NO_KEY", "NO_KEY is not set where the key is needed"),
    ):
        strange = read_sources([RewardConfig(url=url, api_key_env=other)])
        with closing(RewardRunner(strange, start_timeout_s=60)) as made:
            made.start()
            assert problem in str(made.judge(group("a", prompt="?", answer="5"))["url"][0].error)
    with closing(RewardRunner(read_sources([config]), start_timeout_s=60)) as made:
        made.start()
        good = made.judge(group("a", "bcd", prompt="?", answer="5"))["url"]
        bad = made.judge(group("a", prompt="no", answer="5"))["url"]
        server.shutdown()
        server.server_close()
        gone = made.judge(group("a", prompt="?", answer="5"))["url"]
    assert [(each.value, each.notes) for each in good] == [(1.0, {"about": "5"}), (3.0, {"about": "5"})]
    assert "500 Internal Server Error" in str(bad[0].error)
    assert "ConnectError" in str(gone[0].error)


def test_a_reward_model_scores_as_transformers_does(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.actors.engine_helpers import save_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_labels": 1, "pad_token_id": 0},
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "rm")
    save_tokenizer(tmp_path / "rm")
    scored = group("w7 w8 w9", "w7", prompt="w1 w2")
    with closing(
        RewardRunner(read_sources([RewardConfig(model=str(tmp_path / "rm"))]), start_timeout_s=120)
    ) as made:
        made.start()
        found = values(made.judge(scored)["model"])
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "rm")
    for rollout, value in zip(scored.rollouts, found, strict=True):
        ids = tokenizer("2+3?" + rollout.text, return_tensors="pt")
        with torch.inference_mode():
            expected = model(input_ids=ids["input_ids"]).logits[0, 0].item()
        assert value == pytest.approx(expected, abs=1e-5)
