"""Runs the worker scripts of the Megatron tests in processes forked from this one, which has their imports.

python -m tests.actors.megatron_server; reads a job a line and answers with the exit codes of its ranks.
Imports take eight seconds of a core, many times what most cases take.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

IMPORTS = (
    "peft",
    "transformers.models.auto.modeling_auto",
    "actors.megatron_model",
    "actors.megatron_checkpoint",
)


def run_rank(script: Path, rank: int, world_size: int, directory: Path, log: Path) -> None:
    """What `python SCRIPT RANK WORLD_SIZE DIRECTORY` would do."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = [str(script), str(rank), str(world_size), str(directory)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def run(job: dict[str, Any]) -> list[int | None]:
    """Exit codes of all ranks; those that are late are killed."""
    fork = multiprocessing.get_context("fork")
    script, directory, count = Path(job["script"]), Path(job["directory"]), job["world_size"]
    ranks = [
        fork.Process(target=run_rank, args=(script, rank, count, directory, Path(log)))
        for rank, log in enumerate(job["logs"])
    ]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + job["timeout_s"]
    for rank in ranks:
        rank.join(max(0.0, end - time.monotonic()))
    for rank in ranks:
        rank.kill()
        rank.join()
    return [rank.exitcode for rank in ranks]


def main() -> None:
    """Answer until there are no more jobs."""
    answers = os.fdopen(os.dup(1), "w")
    # What imports and ranks print is no answer.
    os.dup2(2, 1)
    from actors import megatron_cpu

    megatron_cpu.install()
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
