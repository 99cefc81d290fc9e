"""Runs that are killed at random: from outside with everything, or piece by piece in a long run. Not a test."""

import argparse
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests.actors.engine_helpers import make_model, save_tokenizer
from tests.actors.fault_chain import AGENTS, Chain, say, table
from tests.actors.fault_driver import PHASES, TITLES, Cell
from tests.actors.run_helpers import Running, make_workspace, start

_LIMIT_S = 400.0
_LOOK_STEPS = 20
_LAG = 2
_SHARED = Path("/dev/shm")


def kills(options: argparse.Namespace, folder: Path) -> bool:
    """One run, killed with SIGKILL at random moments, against one that is not."""
    if not (folder / "model").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        make_workspace(folder)
        make_model("qwen3", seed=7).save_pretrained(folder / "teacher")
        save_tokenizer(folder / "teacher")
    words = _words(options.of, folder)
    cut, log = folder / f"{options.of}-cut", folder / f"{options.of}-kills.txt"
    done = len(log.read_text().splitlines()) if log.is_file() else 0
    rng = random.Random(options.seed + done)
    for number in range(done + 1, options.times + 1):
        line = f"kill {number}: {_killed(words, cut, rng)}"
        say(line)
        with log.open("a") as file:
            file.write(line + "\n")
    last = max(_numbers(cut), default=0) + 5
    whole = folder / f"{options.of}-whole"
    for directory in (cut, whole):
        finished = start(*words, "--max_steps", str(last), "--output_dir", str(directory)).finish(_LIMIT_S)
        assert finished.code == 0, finished.err
    what, same = _same_prompts(cut, whole) if options.of == "lag" else _same_weights(cut, whole)
    say(f"{options.times} kills, {last} steps: {what} of all steps {'are the same' if same else 'DIFFER'}")
    return same


def _words(of: str, folder: Path) -> list[str]:
    """The command that is killed: sft; gkd with a teacher in the ranks; grpo that samples two steps ahead."""
    more = ("--resume_steps", "1", "--lr", "1e-4")
    if of == "sft":
        config = ("sft", "--config", str(folder / "sft.yaml"), "--tensor_model_parallel_size", "1")
        return [*config, "--sft.batch_size", "4", *more]
    data = ("--dataset", str(folder / "train.jsonl"), "--prompts_per_step", "4")
    config = ("grpo", "--config", str(folder / "grpo.yaml"))
    if of == "lag":
        return [*config, *data, *more, "--max_lag", str(_LAG), "--filter_zero_variance", "false"]
    rollout = ("--max_model_len", "64", "--kv_cache_memory_bytes", str(32 << 20), "--step_timeout_s", "120")
    return [
        *(
            "gkd",
            "--model",
            str(folder / "model"),
            "--teacher_model",
            str(folder / "teacher"),
            *more,
            *rollout,
        ),
        *("--dataset", str(folder / "train.jsonl"), "--gkd.batch_size", "4", "--max_completion_length", "10"),
        *("--torch_dtype", "float32", "--num_cpus", "4", "--lmbda", "0.5"),
    ]


def _same_weights(cut: Path, whole: Path) -> tuple[str, bool]:
    weights, others = (load_file(each / "checkpoint" / "model.safetensors") for each in (whole, cut))
    same = all(torch.equal(others[name], weights[name]) for name in weights)
    return "weights, losses and gradient norms", same and _numbers(cut) == _numbers(whole)


def _same_prompts(cut: Path, whole: Path) -> tuple[str, bool]:
    """Of runs whose completions depend on when a sync comes: nothing is lost, and nothing trained on twice."""
    found, expected = (
        sorted((row["step"], row["prompt_id"], row["index"]) for row in _completions(each))
        for each in (cut, whole)
    )
    late = any(row["step"] - 1 - min(row["weight_versions"]) > _LAG for row in _completions(cut))
    return "prompts and numbers of completions", found == expected and not late


def _completions(directory: Path) -> list[dict[str, Any]]:
    """Those that were trained on."""
    rows = map(json.loads, (directory / "rollouts.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == "train"]


def _killed(words: list[str], directory: Path, rng: random.Random) -> str:
    """Start the run and kill it at a random moment: of its start, or of its steps and saves; says when."""
    before = max(_numbers(directory), default=0)
    running = start(*words, "--max_steps", "100000", "--output_dir", str(directory))
    at_start = rng.random() < 0.5
    if not at_start:
        end = time.monotonic() + _LIMIT_S
        while max(_numbers(directory), default=0) <= before and time.monotonic() < end:
            assert running.process.poll() is None, running.finish()
            time.sleep(0.02)
    moment = rng.uniform(2.0, 25.0) if at_start else rng.uniform(0.0, 2.0)
    time.sleep(moment)
    step = max(_numbers(directory), default=0)
    partial = list((directory / "resume").glob("*.bascule-partial"))
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.communicate(timeout=60)
    left = _after_kill(running)
    names = sorted(
        int(path.name[5:]) for path in (directory / "resume").glob("step-*") if path.name[5:].isdigit()
    )
    when = f"{moment:.1f} s after its start" if at_start else f"after step {step}"
    # At a start one may be there from the kill before.
    saving = ", while a state was written" if partial and not at_start else ""
    return f"{when}{saving}; states {names}, processes left {len(left)}"


def _after_kill(running: Running) -> list[int]:
    """Processes that stay for more than half a minute; Ray's own agents, which may, are not counted."""
    end = time.monotonic() + 30.0
    while True:
        agents = {pid for name in AGENTS for pid in running.pids(name)}
        left = [pid for pid in running.pids("") if pid not in agents]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)


def _numbers(directory: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step, of the lines that are complete."""
    path = directory / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row}


def soak(options: argparse.Namespace, folder: Path) -> bool:
    """A long run whose actors are killed at random, in random phases; what it holds on to."""
    rng, chain = random.Random(options.seed), Chain(folder=folder)
    cells: list[Cell] = []
    for number in range(options.kills):
        kind = list(TITLES)[number % len(TITLES)]
        phase = rng.choice([phase for phase in PHASES if phase != "start"])
        step = 10 + number * (options.steps - 20) // options.kills + rng.randrange(5)
        cells.append(Cell(kind=kind, phase=phase, how="kill", step=step))
    if not options.report:
        before = set(_SHARED.iterdir())
        chain.run(cells, options.steps, _Watch(chain))
        say(f"left in {_SHARED}: {_ownerless(before) or 'nothing'}")
        if not options.no_reference:
            chain.reference()
    return table(chain)


def _ownerless(before: set[Path]) -> list[str]:
    """Shared memory that came meanwhile and that no process has: others on the machine have some of their own."""
    maps = ""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            maps += (entry / "maps").read_text() if entry.name.isdigit() else ""
    return [path.name for path in set(_SHARED.iterdir()) - before if str(path) not in maps]


class _Watch:
    """Looks at the processes of a run every some steps."""

    def __init__(self, chain: Chain) -> None:
        self._chain, self._shown = chain, 0
        say("| step | driver MB | driver files | Ray MB | ranks MB | engine MB | processes | zombies |")
        say("|---|---|---|---|---|---|---|---|")

    def __call__(self, running: Running) -> None:
        step = max((line.get("step_done", 0) for line in self._chain.lines("faults")), default=0)
        if step >= self._shown + _LOOK_STEPS:
            self._shown = step - step % _LOOK_STEPS
            self._row(step, running)

    def _row(self, step: int, running: Running) -> None:
        memory, zombies, files = Counter[str](), 0, 0
        pids = running.pids("")
        for process in map(_process, pids):
            if process is None:
                continue
            try:
                kind = _kind(process, running.process.pid)
                memory[kind] += process.memory_info().rss >> 20
                zombies += process.status() == psutil.STATUS_ZOMBIE
                files += process.num_fds() if kind == "driver" else 0
            except psutil.Error:
                continue
        # A zombie has no environment to know it by.
        zombies += sum(
            child.status() == psutil.STATUS_ZOMBIE
            for child in psutil.Process(running.process.pid).children(recursive=True)
            if child.is_running()
        )
        parts = [memory["driver"], files, memory["ray"], memory["rank"], memory["engine"], len(pids), zombies]
        say(f"| {step} | {' | '.join(map(str, parts))} |")


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


_KINDS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("rank", lambda line: line.startswith("ray::TrainerRank")),
    ("engine", lambda line: line.startswith(("ray::Engine", "VLLM"))),
    ("worker", lambda line: line.startswith("ray::")),
)


def _kind(process: psutil.Process, driver: int) -> str:
    if process.pid == driver:
        return "driver"
    line = " ".join(process.cmdline())
    return next((name for name, is_it in _KINDS if is_it(line)), "ray")
