"""Faults x phases of a grpo run, and runs killed at random: the tables of docs/reliability.md. Not a test.

    python -m tests.actors.fault_table faults [--kind engine ...] [--phase sync ...] [--how kill ...]
    python -m tests.actors.fault_table kills [--times 20]
    python -m tests.actors.fault_table soak [--steps 200] [--kills 20]

Each is right only if what comes out is bitwise what an undisturbed run gives, or, where a run ends, if it
does so within its deadlines with a message that names the culprit, and leaves no process.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.actors.fault_driver import PHASES, TITLES
from tests.actors.run_helpers import Finished, make_workspace, start

_NAMES = {"trainer": "trainer rank", "engine": "engine", "bridge": "bridge", "reward": "reward worker"}
_COMMON = ("--resume_steps", "1", "--eval_steps", "2", "--max_steps", "4")
_DEADLINES = ("--cluster.step_timeout_s", "60", "--cluster.collective_timeout_s", "20")
_LIMIT_S = 400.0


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def words_of(folder: Path, name: str, more: Sequence[str] = ()) -> list[str]:
    config = ("grpo", "--config", str(folder / "grpo.yaml"), "--output_dir", str(folder / name))
    return [*config, *_COMMON, *_DEADLINES, *more]


def same(one: Path, other: Path) -> bool:
    """Whether both runs have the same last weights."""
    expected, found = (load_file(each / "checkpoint" / "model.safetensors") for each in (one, other))
    return all(torch.equal(found[name], expected[name]) for name in expected)


def verdict(kind: str, finished: Finished, folder: Path, name: str, reference: Path) -> str:
    """What became of one run."""
    if finished.left:
        return f"WRONG: processes are left: {finished.left}"
    if kind == "driver" and finished.code == -signal.SIGKILL:
        again = start(*words_of(folder, name)).finish(_LIMIT_S)
        if again.code:
            return f"WRONG: started again: {again.err[-300:]}"
        return "goes on when started again" if same(reference, folder / name) else "WRONG: other weights"
    if finished.code == 0:
        return "recovers" if same(reference, folder / name) else "WRONG: other weights"
    named = _NAMES.get(kind, "") in finished.err
    return "ends, names it" if named else f"WRONG: not named: {finished.err[-300:]}"


def faults(options: argparse.Namespace, folder: Path) -> bool:
    reference = folder / "reference"
    assert start(*words_of(folder, "reference")).finish(_LIMIT_S).code == 0
    say("| actor | phase | fault | what happens | seconds |\n|---|---|---|---|---|")
    good = True
    for kind in options.kind:
        for phase in options.phase:
            for how in options.how:
                name, began = f"{kind}-{phase}-{how}", time.monotonic()
                words = words_of(folder, name)
                running = start(*words, program=("-m", "tests.actors.fault_driver", kind, phase, how))
                try:
                    finished = running.finish(_LIMIT_S)
                    found = verdict(kind, finished, folder, name, reference)
                except Exception as error:  # noqa: BLE001
                    found = f"WRONG: {error!r}"
                    for pid in running.pids(""):
                        os.kill(pid, signal.SIGKILL)
                good = good and not found.startswith("WRONG")
                say(f"| {kind} | {phase} | {how} | {found} | {time.monotonic() - began:.0f} |")
                shutil.rmtree(folder / name, ignore_errors=True)
    return good


def kills(options: argparse.Namespace, folder: Path) -> bool:
    """One run of sft, killed with SIGKILL at random moments, against one that is not."""
    steps = ("--max_steps", str(20 * options.times), "--resume_steps", "3", "--lr_decay_style", "cosine")
    words = ["sft", "--config", str(folder / "sft.yaml"), *steps, "--sft.batch_size", "6"]
    assert start(*words, "--output_dir", str(folder / "whole")).finish(_LIMIT_S).code == 0
    rng, cut = random.Random(options.seed), folder / "cut"
    done = 0
    while done < options.times:
        running = start(*words, "--output_dir", str(cut))
        # From the start on, so that starts and first saves are hit as well.
        end = time.monotonic() + rng.uniform(2.0, options.longest)
        while time.monotonic() < end and running.process.poll() is None:
            time.sleep(0.01)
        if running.process.poll() is not None:
            break
        os.kill(running.process.pid, signal.SIGKILL)
        left = running.finish(60).left
        done += 1
        found = sorted(
            int(path.name[5:]) for path in (cut / "resume").glob("step-*") if path.name[5:].isdigit()
        )
        say(f"kill {done}: states {found}, processes left {len(left)}")
    finished = start(*words, "--output_dir", str(cut)).finish(_LIMIT_S)
    lines = [
        [
            line.partition('"tokens_per_second"')[0]
            for line in (each / "metrics.jsonl").read_text().splitlines()
        ]
        for each in (folder / "whole", cut)
    ]
    good = finished.code == 0 and same(folder / "whole", cut) and lines[0] == lines[1]
    say(f"{done} kills: weights, losses and gradient norms {'are the same' if good else 'DIFFER'}")
    return good


def soak(options: argparse.Namespace, folder: Path) -> bool:
    """A long run with engines, reward workers and trainer ranks killed at random; what it holds on to."""
    rng = random.Random(options.seed)
    more = ("--max_steps", str(options.steps), "--bridge.max_recoveries", "1000", "--resume_steps", "5")
    words = words_of(folder, "soak", (*more, "--reward_workers.max_recoveries", "1000", "--eval_steps", "50"))
    running, shared = start(*words), Path("/dev/shm")
    before = len(list(shared.iterdir()))
    say("| step | driver MB | driver files | all processes | zombies | all MB |\n|---|---|---|---|---|---|")
    metrics, shown, killed = folder / "soak" / "metrics.jsonl", 0, 0
    while running.process.poll() is None:
        time.sleep(1)
        step = metrics.read_text().count('"loss"') if metrics.is_file() else 0
        if step > shown and step % 20 == 0:
            shown = step
            say(_row(step, running.process.pid, running.pids("")))
        if step and killed < options.kills and rng.random() < options.kills / options.steps / 2:
            kind = rng.choice(("engine", "reward", "trainer"))
            pids = running.pids(TITLES[kind])
            if pids:
                os.kill(rng.choice(pids), signal.SIGKILL)
                killed += 1
                say(f"killed: {kind} in step {step + 1}")
    finished = running.finish(_LIMIT_S)
    after = len(list(shared.iterdir()))
    say(f"{killed} kills, exit {finished.code}, left {finished.left}, /dev/shm {before} -> {after} entries")
    return finished.code == 0 and not finished.left


def _row(step: int, driver: int, pids: Sequence[int]) -> str:
    import psutil

    main = psutil.Process(driver)
    states, memory = [], 0.0
    for pid in pids:
        try:
            process = psutil.Process(pid)
            states.append(process.status())
            memory += process.memory_info().rss / (1 << 20)
        except psutil.Error:
            continue
    own = main.memory_info().rss / (1 << 20)
    zombies = sum(state == psutil.STATUS_ZOMBIE for state in states)
    return f"| {step} | {own:.0f} | {main.num_fds()} | {len(states)} | {zombies} | {memory:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("faults", "kills", "soak"))
    parser.add_argument("--kind", nargs="*", default=[*TITLES, "driver"])
    parser.add_argument("--phase", nargs="*", default=["start", *PHASES])
    parser.add_argument("--how", nargs="*", default=["kill", "stop"])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--longest", type=float, default=20.0, help="seconds from a start to the latest kill")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {"faults": faults, "kills": kills, "soak": soak}
        return 0 if commands[options.what](options, make_workspace(Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main())
