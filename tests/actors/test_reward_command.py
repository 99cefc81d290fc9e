"""`bascule reward` as a user calls it: on a dataset, on recorded completions, on a run's directory."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.cli import main
from actors.reward_swap import post_answer, read_rewards, take_request, write_rewards
from algorithms.data import Scored, float_row
from algorithms.stored_rollouts import stored_row
from configs.errors import BasculeError, ConfigError
from configs.rewards import RewardConfig
from tests.algorithms.rewards.groups import group

ROOT = Path(__file__).parents[2]
FUNCTIONS = """
def exact(completion, answer):
    return float(completion == answer)

def near(completion, answer):
    return 1 - abs(int(completion or 0) - int(answer)) / 10

def fails(completion):
    return 1 / len(completion)

def lacks(completion, solution):
    return 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: functions, a dataset, a config, and a run that has recorded a step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text(FUNCTIONS)
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(3))
    )
    config = {
        "algorithm": "grpo",
        "model": {"model": "none"},
        "data": {"dataset": "d.jsonl"},
        "rewards": [{"function": "f.py:exact"}],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "run").mkdir()
    rows: list[dict[str, Any]] = []
    for name, texts in (("p0", ("5", "4", "5")), ("p1", ("7", "7", "3"))):
        values = [float(text == "5") for text in texts]
        scored = Scored(
            group=group(*texts, name=name, prompt="2+3=", answer="5"),
            rewards=float_row(values),
            parts={"exact": tuple(values)},
        )
        rows += [stored_row(1, "train", scored, index) for index in range(3)]
    (tmp_path / "run" / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_rewards(tmp_path / "run", [RewardConfig(function="f.py:exact")])
    return tmp_path


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["reward", *words])
    read = capsys.readouterr()
    return code, read.out + read.err


@pytest.mark.usefixtures("folder")
def test_check_calls_every_reward_on_the_first_rows(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = command(capsys, "check", "--config", "c.yaml", "--rows", "2")
    digest = hashlib.sha256(FUNCTIONS.encode()).hexdigest()[:12]
    assert code == 0
    assert f"reward exact: f.py:exact, sha256 {digest}, weight 1, called once per completion" in out
    lines = [line.rpartition(",")[0] for line in out.splitlines() if line.startswith("  train-")]
    assert lines == [
        "  train-1, completion '1' (column answer): 1",
        "  train-1, completion '': 0",
        "  train-2, completion '2' (column answer): 1",
        "  train-2, completion '': 0",
    ]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        (
            "f.py:fails",
            1,
            "completion '': FAILED: reward fails: prompt train-1, completion 1: ZeroDivisionError",
        ),
        ("f.py:lacks", 2, "asks for the argument 'solution'"),
        ("f.py:exakt", 2, "no function exakt; did you mean exact?"),
        ("g.py:exact", 2, "g.py cannot be read"),
    ],
)
def test_check_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], function: str, code: int, message: str
) -> None:
    found, out = command(capsys, "check", "--config", "c.yaml", "--rewards.0.function", function)
    assert (found, message in out) == (code, True), out


def test_score_compares_two_rewards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("score", "run", "--reward", "f.py:near", "--against", "recorded:exact", "--html", "page.html")
    code, out = command(capsys, *words)
    assert code == 0
    # By hand: near is 1, 0.9, 1 and 0.8, 0.8, 0.8; exact 1, 0, 1 and 0, 0, 0.
    assert "6 completions in 2 groups" in out
    assert "mean 0.8833," in out
    assert "agreement: 2 of 6 the same" in out
    assert "groups with signal: 1 of 2, 1 under the old reward" in out
    assert out.index("step 1, p0, completion 1: 0 -> 0.9") < out.index("step 1, p1, completion 0: 0 -> 0.8")
    page = (folder / "page.html").read_text()
    assert page.count("<article>") == 4 + 6
    assert "step 1, p0, completion 1" in page
    code, out = command(
        capsys, "score", "run/rollouts.jsonl", "--reward", "f.py:near", "--against", "f.py:exact"
    )
    assert "agreement: 2 of 6 the same" in out


@pytest.mark.usefixtures("folder")
def test_score_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, message in (
        (("--reward", "f.py:lacks"), 2, "asks for the argument 'solution'"),
        (("--reward", "f.py:exact", "--against", "recorded:style"), 2, "no reward style was recorded"),
        (("--reward", "f.py:exact", "--first_step", "9"), 2, "has no rollouts from step 9 on"),
        (("--reward", "{function: f.py:exact, wait: 1}"), 2, "--reward: wait Extra inputs"),
        (("--reward", "{function: f.py:near, kwargs: {answer: many}}"), 1, "6 failed"),
        (("--reward", "f.py:exact", "--what"), 2, "unknown arguments: --what"),
    ):
        found, out = command(capsys, "score", "run", *words)
        assert (found, message in out) == (code, True), out


def test_score_needs_no_torch_ray_or_vllm(folder: Path) -> None:
    program = (
        "import sys; from actors.cli import main; "
        "code = main(['reward', 'score', 'run', '--reward', 'f.py:exact']); "
        "sys.exit(code or ','.join({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)) or None)"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        **{"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 120},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def answer_once(directory: Path, error: str | None, seen: list[Any]) -> threading.Thread:
    """The run's part: takes a request and answers it."""

    def wait() -> None:
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            request = take_request(directory)
            if request is not None:
                seen.append(request)
                post_answer(directory, request[0], step=7, error=error)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_reload_hands_the_checked_rewards_to_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run" / "rewards.yaml").write_text("- {function: f.py:near, weight: 2, on_error: zero}")
    seen: list[Any] = []
    run = answer_once(folder / "run", None, seen)
    code, out = command(capsys, "reload", "run")
    run.join()
    assert (code, "in use from step 7 on" in out) == (0, True), out
    assert "mean on the last 6 completions 0.883" in out
    ((_, (source,)),) = seen
    assert source.config == RewardConfig(function="f.py:near", weight=2, on_error="zero")
    assert source.text == FUNCTIONS


def test_reload_tells_that_the_run_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = answer_once(folder / "run", "no module named x on that machine", [])
    code, out = command(capsys, "reload", "run")
    run.join()
    assert (code, "keeps those it has: no module named x" in out) == (1, True), out


def test_a_bad_new_reward_never_reaches_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        ("- {function: f.py:exakt}", "did you mean exact?"),
        ("- {function: f.py:lacks}", "asks for the argument 'solution'"),
        ("- {function: f.py:fails, kwargs: {completion: ''}}", "ZeroDivisionError"),
        ("- {function: f.py:exact, weight: heavy}", "0.weight: Input should be a valid number"),
        ("{}", "has to be a list of one reward at least"),
        ("- {", "is no YAML"),
    ):
        (folder / "run" / "rewards.yaml").write_text(content)
        code, out = command(capsys, "reload", "run")
        assert (code, message in out) == (2, True), out
        assert take_request(folder / "run") is None


def test_a_request_that_nobody_takes_is_taken_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = command(capsys, "reload", "run", "--wait_s", "0.1")
    assert (code, "no step began within 0.1 s; the request was taken back" in out) == (1, True), out
    assert take_request(folder / "run") is None
    (folder / "run" / "result.json").write_text("{}")
    assert "this run has ended" in command(capsys, "reload", "run")[1]


def test_rewards_of_a_run_are_written_with_whole_paths(folder: Path) -> None:
    rewards = [
        RewardConfig(function="f.py:exact", weight=0.5),
        RewardConfig(function="exact_match", kwargs={"answer": "5"}),
        RewardConfig(url="http://here/score", timeout_s=60),
    ]
    write_rewards(folder / "run", rewards)
    first, *others = read_rewards(folder / "run")
    assert first == RewardConfig(function=f"{folder / 'f.py'}:exact", weight=0.5)
    assert others == rewards[1:]
    with pytest.raises(ConfigError, match="give the directory of a run of grpo"):
        read_rewards(folder)
    assert issubclass(ConfigError, BasculeError)
