"""How fast the bridge loads and saves against raw reads and writes of the same bytes, and its extra memory.

    python -m benchmarks.bridge [--processes 1 2 4] [--model smollm2 dense-1b moe-1b] [--directory DIR]

Weights are bfloat16, files in the page cache. Raw reads go into memory that is there already, each process its
share in one call; raw writes into a file that is reserved first, with fdatasync. All four alternate in one run of
the processes; a time is that of the slowest process, the table has medians. Extra memory is the peak of the
resident memory over that before the call, in buckets, of the process with most.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bridge_models import MODELS, layout_of, prepare

ROOT = Path(__file__).parents[1]
TIMES = ("load s", "raw s", "ratio", "save s", "raw s", "ratio")
COLUMNS = ("model", "ranks", "layout", "GB", *TIMES, "load extra", "save extra")
GOALS = "goals: load and save within 1.5 of raw, extra memory under 2 buckets"


def run(jobs: Sequence[dict[str, Any]]) -> None:
    """Start a process for each job and wait. Raises CalledProcessError when one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bridge_worker", json.dumps(job)], cwd=ROOT, env=environment
        )
        for job in jobs
    ]
    try:
        for process in processes:
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, process.args)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(model: str, ranks: int, folder: Path, repetitions: int) -> list[str]:
    """A row of the table."""
    layout = layout_of(model, ranks)
    result = folder / f"result-{model}-{ranks}"
    job = {
        "world_size": ranks,
        "layout": layout,
        "directory": str(folder / model),
        "scratch": str(folder),
        "repetitions": repetitions,
        "result": str(result),
        "create": None,
    }
    run([job | {"rank": rank} for rank in range(ranks)])
    found = [json.loads(Path(f"{result}.{rank}").read_text()) for rank in range(ranks)]
    seconds = {name: statistics.median(values) for name, values in found[0]["seconds"].items()}
    extra = {
        name: max(max(rank["extra"][name]) for rank in found) / found[0]["bucket"]
        for name in ("load", "save")
    }
    row = [model, str(ranks), describe(layout), f"{found[0]['total'] / 1e9:.2f}"]
    for ours, raw in (("load", "raw read"), ("save", "raw write")):
        row += [f"{seconds[ours]:.3f}", f"{seconds[raw]:.3f}", f"{seconds[ours] / seconds[raw]:.2f}"]
    return [*row, f"{extra['load']:.2f}", f"{extra['save']:.2f}"]


def describe(layout: dict[str, int]) -> str:
    """Short names of the sizes above one."""
    names = {"tensor": "TP", "pipeline": "PP", "data": "DP", "expert": "EP"}
    sizes = {names[option.split("_", maxsplit=1)[0]]: size for option, size in layout.items() if size > 1}
    return " ".join(f"{name}{size}" for name, size in sizes.items()) or "-"


def create(model: str, folder: Path) -> None:
    """Write the model to `folder`/`model`."""
    directory, config = folder / model, folder / f"{model}-config"
    if prepare(model, directory, config):
        job = {"world_size": 1, "rank": 0, "layout": {}, "directory": str(config), "create": str(directory)}
        run([job | {"result": str(folder / f"create-{model}")}])


def show(row: Sequence[str]) -> None:
    """Print a row of a Markdown table."""
    sys.stdout.write("| " + " | ".join(cell.ljust(10) for cell in row) + " |\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the bridge")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="for temporary files")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bascule-bridge-", dir=arguments.directory))
    try:
        show(COLUMNS)
        show(["-" * 10] * len(COLUMNS))
        for model in arguments.model:
            create(model, folder)
            for ranks in arguments.processes:
                show(measure(model, ranks, folder, arguments.repetitions))
            shutil.rmtree(folder / model)
        sys.stdout.write(f"\n{GOALS}; a bucket has 64 MiB\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
