"""Starts the ranks of a Megatron test's worker script and reads what they measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_workers(
    script: Path, world_size: int, directory: Path, *, prefix: str = "", timeout_s: float = 240
) -> list[dict[str, Any]]:
    """Run `script` RANK WORLD_SIZE DIRECTORY for every rank; results by rank.

    A rank writes `directory`/`prefix`RANK.json; what it says is in `prefix`RANK.log. A rank that fails is an
    AssertionError with the end of that.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    logs = [log_of(directory, rank, prefix) for rank in range(world_size)]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(script), str(rank), str(world_size), str(directory)]
            with log.open("w") as stream:
                workers.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
                    )
                )
        codes = [worker.wait(timeout=timeout_s) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for log, code in zip(logs, codes, strict=True):
        assert code == 0, log.read_text()[-5000:]
    return [json.loads((directory / f"{prefix}{rank}.json").read_text()) for rank in range(world_size)]


def log_of(directory: Path, rank: int, prefix: str = "") -> Path:
    """The file with what a rank said."""
    return directory / f"{prefix}{rank}.log"
