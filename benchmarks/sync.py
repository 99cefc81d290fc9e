"""How long a weight sync takes, against a plain broadcast, a reload from disk, and one tensor at a time.

    python -m benchmarks.sync [--model smollm2 dense-1b] [--bucket_size_mb 4 16 64] [--repetitions 7]

Three processes: a trainer rank that owns all tensors, the bridge, and one vLLM engine (in process, so that all
ways end in the same model). Weights are bfloat16. Ours is everything: packing and hashing on the trainer, the
bridge, the check of every hash and of every layer, loading. Against it, alternating in one run of the same
processes:

  broadcast   the bridge broadcasts as many bytes to trainer and engine in buckets of 16 MB (nothing is loaded)
  disk        the trainer writes safetensors, in memory-backed files where there are, and vLLM reloads them
  one by one  a gloo broadcast for each tensor and a call of vLLM's loader, hashes and checks left out
  load alone  vLLM's loaders load what is in the engine's own memory, in one call

Times are from the start to the engine's readiness, medians in seconds; `fastest` is ours, with its ratio to the
fastest broadcast, `processor s` what the three processes computed, with its ratio to that in a broadcast, which a
busy machine changes little. The first sync, in which copies are recorded, is not counted. Extra memory is the peak
of resident memory during a sync over that before it, trainer and bridge, in buckets.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

from actors.engine_settings import engine_environment
from benchmarks.sync_parts import WAYS, bridge_main, engine_main, trainer_main, write_model
from bridge.transport.gloo import free_port
from bridge.transport.registry import OWNED_ENGINE

HOST = "127.0.0.1"


def measure(model: str, bucket_mb: float, repetitions: int, folder: Path) -> dict[str, Any]:
    """Seconds of every way, and extra memory."""
    context = multiprocessing.get_context("spawn")
    job = {
        "model": str(folder / model),
        "scratch": str(folder),
        "bucket_bytes": int(bucket_mb * (1 << 20)),
        "repetitions": repetitions,
        "ports": [free_port(HOST) for _ in range(3)],
    }
    results = context.SimpleQueue()
    mains = (trainer_main, bridge_main, engine_main)
    parts = [context.Process(target=part, args=(job, results), name=part.__name__) for part in mains]
    for part in parts:
        with _environment(engine_environment(job["model"], "cpu", 1) if part.name == "engine_main" else {}):
            part.start()
    waiting = {part.sentinel: part for part in parts}
    while waiting:
        for sentinel in wait(list(waiting)):
            part = waiting.pop(cast(int, sentinel))
            part.join()
            if part.exitcode:
                for other in parts:
                    other.kill()
                raise SystemExit(f"{part.name} ended with {part.exitcode}")
    found: dict[str, Any] = {}
    while not results.empty():
        found |= results.get()
    return found


@contextmanager
def _environment(variables: Mapping[str, str]) -> Generator[None]:
    """What a process that starts meanwhile finds: OpenMP and glibc read theirs before any of our code runs."""
    before = dict(os.environ)
    # All in one process, which is none of a run's engines.
    os.environ.update({**variables, OWNED_ENGINE: "0"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def row(model: str, bucket_mb: float, found: dict[str, Any]) -> str:
    """A row of the table."""
    seconds = {way: statistics.median(found[way]) for way in WAYS}
    ours = seconds["ours"]
    ratios = [f"{seconds[way]:.2f} ({ours / seconds[way]:.2f})" for way in WAYS[1:]]
    fastest = {way: min(found[way]) for way in WAYS}
    cells = [
        model,
        f"{bucket_mb:g}",
        f"{found['nbytes'] / 1e9:.2f}",
        f"{found['buckets']}",
        f"{ours:.2f}",
        *ratios,
        f"{fastest['ours']:.2f} ({fastest['ours'] / fastest['broadcast']:.2f})",
        f"{busy(found, 'ours'):.2f} ({busy(found, 'ours') / busy(found, 'broadcast'):.2f})",
        f"{statistics.median(found['hash_seconds']):.3f}",
        f"{found['trainer_extra'] / found['largest_bucket']:.2f}",
        f"{found['bridge_extra'] / found['largest_bucket']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def busy(found: dict[str, Any], way: str) -> float:
    """Processor seconds of the three processes together, each in its median repetition after the first."""
    return sum(statistics.median(found[f"{part}_busy"][way][1:]) for part in ("trainer", "bridge", "engine"))


def emit(text: str) -> None:
    """Show it at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["smollm2", "dense-1b"])
    parser.add_argument("--bucket_size_mb", nargs="+", type=float, default=[4.0, 16.0, 64.0])
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args(arguments)
    emit(
        "| model | bucket MB | GB | buckets | ours s | broadcast (ratio) | disk | one by one | load alone | "
        "fastest | processor s | hash s | trainer extra | bridge extra |\n" + "|---" * 14 + "|"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in options.model:
            write_model(model, folder / model)
            for bucket_mb in options.bucket_size_mb:
                found = measure(model, bucket_mb, options.repetitions, folder)
                emit(row(model, bucket_mb, found))


if __name__ == "__main__":
    main()
