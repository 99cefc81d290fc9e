"""Runs of the real command in a process of their own, on models that take seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from algorithms.data import int_row
from tests.actors.engine_helpers import make_model, prompt, reference_greedy, save_tokenizer

ROOT = Path(__file__).parents[2]
# As `python -m actors.cli`, but a shell that starts the tests in the background has SIGINT ignored.
PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from actors.cli import main; sys.exit(main())"
)
_MARK = "BASCULE_TEST_RUN"
# In the environment of every run of a test; nothing that a run writes may hold it.
CANARY = "canary-5c7c0f2e"
_SECRETS = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "JUDGE_KEY"), CANARY)
# What depends on how long something took.
_TIMES = ("time/", "tokens_per_second", "sync/", "engines/")
_OF_RAY = ("RAY_ADDRESS", "RAY_AUTH_MODE")


def make_workspace(folder: Path, family: str = "qwen3") -> Path:
    """A model, prompts (`train.jsonl`, `eval.jsonl`, `sft.jsonl`), reward functions and two configs."""
    make_model(family, seed=3).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    for name, numbers in (("train", range(20)), ("eval", range(100, 106)), ("sft", range(16))):
        rows = [
            {"prompt": _words(number), "completion": _words(number + 500), "target": number}
            for number in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(
        "def low_words(completion: str, target: int) -> float:\n"
        "    words = completion.split()\n"
        "    return sum(int(word[1:]) < 150 for word in words) / 10\n"
        "def broken(completion: str) -> float:\n"
        "    raise RuntimeError('no such thing')\n"
    )
    _write_yaml(folder / "grpo.yaml", _grpo(folder))
    _write_yaml(folder / "sft.yaml", _sft(folder))
    return folder


def _words(number: int) -> str:
    return " ".join(f"w{token}" for token in prompt(number, length=4).tokens)


def _common(folder: Path) -> dict[str, Any]:
    return {
        "model": {"model": str(folder / "model"), "torch_dtype": "float32"},
        "trainer": {"tensor_model_parallel_size": 2, "lr": 3e-3, "micro_batch_size": 4},
        "cluster": {"num_cpus": 4, "step_timeout_s": 120},
    }


def _grpo(folder: Path) -> dict[str, Any]:
    return _common(folder) | {
        "algorithm": "grpo",
        "output_dir": str(folder / "grpo"),
        "max_steps": 3,
        "rollout": {"max_model_len": 64, "max_num_seqs": 16, "kv_cache_memory_bytes": 32 << 20},
        "grpo": {"num_generations": 4, "prompts_per_step": 4, "max_completion_length": 10},
        "data": {"dataset": str(folder / "train.jsonl"), "eval_dataset": str(folder / "eval.jsonl")},
        "rewards": [{"function": f"{folder / 'rewards.py'}:low_words"}],
        # Several buckets, the embedding larger than one.
        "bridge": {"bucket_size_mb": 0.05},
    }


def _sft(folder: Path) -> dict[str, Any]:
    return _common(folder) | {
        "algorithm": "sft",
        "output_dir": str(folder / "sft"),
        "max_steps": 4,
        "sft": {"batch_size": 16},
        "data": {"dataset": str(folder / "sft.jsonl")},
    }


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content))


@dataclass(frozen=True)
class Finished:
    """A command that has ended, and what is left of its processes."""

    code: int
    out: str
    err: str
    left: list[str]

    def result(self) -> dict[str, Any]:
        """What the last line says."""
        head, _, rest = self.out.rstrip().rpartition("\n")[2].partition("result: ")
        assert head == "", self.out + self.err
        return json.loads(rest)


@dataclass(frozen=True)
class Running:
    """A command and the mark in its environment, which its children inherit."""

    process: subprocess.Popen[str]
    mark: str

    def pids(self, command: str) -> list[int]:
        """Processes of the run whose command line begins with this."""
        return [pid for pid, line in _marked(self.mark).items() if line.startswith(command)]

    def kill_an_engine(self, metrics: Path) -> None:
        """After the first step, with SIGKILL; what comes after has to be as if nothing had been."""
        while self.process.poll() is None:
            # Not row by row: the last line may be half written.
            if metrics.is_file() and '"loss"' in metrics.read_text():
                os.kill(self.pids("ray::Engine")[0], signal.SIGKILL)
                return
            time.sleep(0.05)

    def wait_for(self, is_there: Callable[[], bool], timeout: float = 300) -> None:
        """Wait until it is so; the run has to go on meanwhile."""
        end = time.monotonic() + timeout
        while not is_there():
            assert self.process.poll() is None, self.finish()
            assert time.monotonic() < end, "it does not come to pass"
            time.sleep(0.01)

    def leave_behind(self, directory: Path, copy: Path) -> None:
        """Copy what a SIGKILL of the driver would leave of its run directory now, and let it go on."""
        self.process.send_signal(signal.SIGSTOP)
        shutil.copytree(directory, copy, symlinks=True)
        self.process.send_signal(signal.SIGCONT)

    def finish(self, timeout: float = 300) -> Finished:
        """Wait for the end; then give its daemons a moment and list those that stay."""
        out, err = self.process.communicate(timeout=timeout)
        assert CANARY not in out + err
        left = _marked(self.mark)
        # Ray's workers are nice processes, which a busy machine lets wait even for their end.
        for _ in range(300):
            if not left:
                break
            time.sleep(0.1)
            left = _marked(self.mark)
        return Finished(code=self.process.returncode, out=out, err=err, left=list(left.values()))


def start(*arguments: str, program: Sequence[str] = ("-c", PROGRAM)) -> Running:
    """`bascule ARGUMENTS` in a new process."""
    mark = uuid.uuid4().hex
    # As from a shell: Ray leaves word in the environment of a process that has started it.
    environment = {name: value for name, value in os.environ.items() if name not in _OF_RAY}
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        env=environment | _SECRETS | {_MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Running(process=process, mark=mark)


def run(*arguments: str) -> Finished:
    """`bascule ARGUMENTS`, waited for."""
    return start(*arguments).finish()


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_secrets(directory: Path) -> list[Path]:
    """Files anywhere below that hold what only the environment of a run should."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in files if CANARY.encode() in path.read_bytes()]


def steps_of(metrics: Path) -> list[int]:
    """Steps that were trained, of the lines that are complete."""
    text = metrics.read_text() if metrics.is_file() else ""
    found = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [row["step"] for row in found if "loss" in row]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """The row without what depends on how long something took."""
    return {
        name: value for name, value in row.items() if not name.startswith(_TIMES) and "seconds" not in name
    }


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise the same numbers, completions and last weights."""
    for name in ("metrics.jsonl", "rollouts.jsonl", "tokens.jsonl"):
        expected_rows, found_rows = (list(map(without_times, rows(each / name))) for each in (one, other))
        assert found_rows == expected_rows, name
    assert_same_weights(*(each / "checkpoint" / "model.safetensors" for each in (one, other)))


def assert_same_weights(one: Path, other: Path) -> None:
    """Bitwise the same tensors in both files."""
    expected, found = map(load_file, (one, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def evaluated(directory: Path, step: int) -> list[dict[str, Any]]:
    """The completions of a run's evaluation after a step."""
    return [
        row for row in rows(directory / "rollouts.jsonl") if (row["split"], row["step"]) == ("eval", step)
    ]


def assert_texts_are_transformers(directory: Path, checkpoint: Path, step: int) -> None:
    """What the engines said after the last step is what transformers generates with the checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    last = evaluated(directory, step)
    assert len(last) == 6
    for row in last:
        tokens = int_row(tokenizer(row["messages"][-1]["content"])["input_ids"])
        expected = reference_greedy(model, tokens, 10)
        # An engine's text goes on from the prompt, so it begins with the space between two words.
        assert row["completion"].split() == tokenizer.decode(expected, skip_special_tokens=True).split()
        assert row["weight_versions"] == [step, step]


def _marked(mark: str) -> dict[int, str]:
    """Command lines of the processes that have the mark."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(entry.name)] = line[:200]
        except OSError:  # it ended while we looked
            continue
    return found
