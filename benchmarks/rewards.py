"""What it costs to call rewards in processes of their own, against calling them in this one.

    python -m benchmarks.rewards [--groups 200] [--completions 8] [--length 2000]

Prints the time of a plain function's call here and in a child, what a group with a hanging call takes against its
deadline, how many async calls that wait run side by side, and a sandboxed program against a bare interpreter.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from algorithms.data import Group, Prompt, Rollout, float_row, int_row
from algorithms.rewards.calling import calls_of
from algorithms.rewards.child import call_now
from algorithms.rewards.loading import build_reward, read_sources
from algorithms.rewards.process import RewardRunner
from algorithms.rewards.sandbox import run_sandboxed
from configs.rewards import RewardConfig

FUNCTIONS = """
import asyncio, time

def exact(completion, answer):
    return float(completion.strip() == answer)

def hangs(completion):
    while completion == "hang":
        pass
    return 1.0

async def waits(completion):
    await asyncio.sleep(0.1)
    return 1.0
"""


def group(number: int, texts: list[str], length: int) -> Group:
    rollouts = tuple(
        Rollout(
            tokens=int_row([7] * length),
            logprobs=float_row([-1.0] * length),
            text=text,
            finish="stop",
            loss_mask=int_row([1] * length),
            versions=(0, 0),
        )
        for text in texts
    )
    messages = ({"role": "user", "content": "?"},)
    prompt = Prompt(id=f"p{number}", tokens=int_row([1]), messages=messages, columns={"answer": "x"})
    return Group(prompt=prompt, rollouts=rollouts)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def runner(path: Path, name: str, **options: Any) -> RewardRunner:
    made = RewardRunner(
        read_sources([RewardConfig(function=f"{path}:{name}", **options)]), start_timeout_s=120
    )
    made.start()
    return made


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def plain_calls(path: Path, count: int, completions: int, length: int) -> None:
    groups = [group(number, [" x " * 500] * completions, length) for number in range(count)]
    reward = build_reward(read_sources([RewardConfig(function=f"{path}:exact")])[0])

    def here() -> None:
        for each in groups:
            for call in calls_of(reward, each, range(completions)):
                call_now(reward, each, call)

    with closing(runner(path, "exact")) as made:
        made.judge(groups[0])
        times = [(seconds(here), seconds(lambda: [made.judge(each) for each in groups])) for _ in range(5)]
    inside, outside = min(here for here, _ in times), min(there for _, there in times)
    calls = count * completions
    say(
        f"plain calls: {1e6 * inside / calls:.0f} us here, {1e6 * outside / calls:.0f} us in a child, of "
        f"completions of {length} tokens: {calls / outside:.0f} calls/s in a worker"
    )


def hanging_call(path: Path) -> None:
    with closing(runner(path, "hangs", timeout_s=1.0)) as made:
        made.judge(group(0, ["fine"], 10))
        took = seconds(lambda: made.judge(group(1, ["fine", "hang", "fine"], 10)))
    say(f"a group with one call that hangs: {took:.2f} s, {took - 1:.2f} s more than its deadline of 1 s")


def async_calls(path: Path) -> None:
    with closing(runner(path, "waits", max_concurrency=64)) as made:
        groups = [group(number, ["x"] * 8, 100) for number in range(32)]

        def judge() -> None:
            futures = [made.submit(each, range(8), (0,))[0] for each in groups]
            for future in futures:
                future.result()

        judge()
        took = min(seconds(judge) for _ in range(3))
    say(
        f"256 async calls that wait 0.1 s each, 64 at a time: {took:.2f} s, "
        f"{took / 0.4:.2f}x of what waiting takes"
    )


def sandboxed() -> None:
    code = "print(1)"
    bare = [sys.executable, "-I", "-S", "-c", code]
    times = [
        (
            seconds(lambda: subprocess.run(bare, check=True, capture_output=True)),
            seconds(lambda: run_sandboxed(code)),
        )
        for _ in range(20)
    ]
    alone, inside = min(alone for alone, _ in times), min(inside for _, inside in times)
    say(f"a program in the sandbox: {1e3 * inside:.0f} ms, a bare interpreter {1e3 * alone:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=200)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--length", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "functions.py"
        path.write_text(FUNCTIONS)
        plain_calls(path, options.groups, options.completions, options.length)
        hanging_call(path)
        async_calls(path)
    sandboxed()


if __name__ == "__main__":
    main()
