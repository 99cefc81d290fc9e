"""One rank of the bridge's benchmark: loads and saves, alternating with raw reads and writes of as many bytes.

python -m benchmarks.bridge_worker JOB_JSON. The job says rank, world_size, layout, directory (of the model),
scratch (where it is saved), repetitions and result (the file for the measurements); with `create`, a directory, a
model of random weights is written there and nothing is measured.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors import megatron_cpu

megatron_cpu.install()

from actors.megatron_setup import (  # noqa: E402
    build_chunks,
    initialize_megatron,
    shutdown_megatron,
    transformer_config,
)
from bridge.megatron import named_parameters  # noqa: E402
from bridge.model_bridge import BUCKET_BYTES, ModelBridge  # noqa: E402
from configs.schema import LayoutConfig  # noqa: E402

_MOST_AT_ONCE = 1 << 30


def timed(action: Callable[[], object]) -> float:
    """Seconds from when the first rank begins until the last one is through."""
    dist.barrier()
    # One clock for all processes of a machine. With more ranks than cores not all begin at once.
    start = time.monotonic()
    action()
    times = torch.tensor([-start, time.monotonic()], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.sum().item()


def extra_memory(action: Callable[[], object]) -> int:
    """Bytes by which the resident memory grew at its peak."""
    # What earlier calls have freed goes back, so that it is counted when it is taken again.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def raw_read(files: Sequence[Path], skip: int, buffer: torch.Tensor) -> None:
    """Fill the buffer from the files one after the other, beginning at byte `skip` of all, round to the start."""
    view, offset = buffer.numpy().data, skip
    sizes = [path.stat().st_size for path in files]
    while view:
        offset %= sum(sizes)
        number = next(n for n in range(len(files)) if offset < sum(sizes[: n + 1]))
        descriptor = os.open(files[number], os.O_RDONLY)
        count = os.preadv(descriptor, [view[:_MOST_AT_ONCE]], offset - sum(sizes[:number]))
        os.close(descriptor)
        view, offset = view[count:], offset + count


def raw_write(path: Path, total: int, skip: int, buffer: torch.Tensor) -> None:
    """Write the buffer at byte `skip` of a file that rank 0 has reserved, and to the disk."""
    if dist.get_rank() == 0:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(descriptor, 0, total)
        os.close(descriptor)
    dist.barrier()
    descriptor = os.open(path, os.O_WRONLY)
    view, offset = buffer.numpy().data, skip
    while view:
        count = os.pwrite(descriptor, view[:_MOST_AT_ONCE], offset)
        view, offset = view[count:], offset + count
    os.fdatasync(descriptor)
    os.close(descriptor)
    dist.barrier()


def fill(parameters: dict[str, torch.Tensor]) -> None:
    """Random weights of the size of a model's, quickly: the same million over and over."""
    block = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for parameter in parameters.values():
        for part in parameter.detach().view(-1).split(len(block)):
            part.copy_(block[: len(part)])


def measure(job: dict[str, Any], bridge: ModelBridge, chunks: list[Any]) -> dict[str, Any]:
    """Seconds and extra bytes of every repetition, and the bytes that were moved."""
    rank, size = dist.get_rank(), dist.get_world_size()
    files = sorted(Path(job["directory"]).glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    scratch = Path(job["scratch"])
    loaded = bridge.load(chunks).bytes_read
    read = torch.zeros(loaded, dtype=torch.uint8).fill_(1)
    first, last = rank * total // size, (rank + 1) * total // size
    write = torch.zeros(last - first, dtype=torch.uint8).fill_(1)
    actions: dict[str, Callable[[], object]] = {
        "load": lambda: bridge.load(chunks),
        "raw read": lambda: raw_read(files, first, read),
        "save": lambda: bridge.save(chunks, scratch / "saved"),
        "raw write": lambda: raw_write(scratch / "raw", total, first, write),
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    extra: dict[str, list[int]] = {name: [] for name in actions}
    for _ in range(job["repetitions"]):
        for name, action in actions.items():
            extra[name].append(extra_memory(lambda: seconds[name].append(timed(action))))  # noqa: B023
    return {"seconds": seconds, "extra": extra, "read": loaded, "total": total, "bucket": BUCKET_BYTES}


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    layout = LayoutConfig(**job["layout"])
    initialize_megatron(
        layout,
        rank=job["rank"],
        world_size=job["world_size"],
        init_method=f"file://{job['result']}.store",
        timeout_s=300,
        seed=1,
        device="cpu",
    )
    bridge = ModelBridge(job["directory"])
    chunks = build_chunks(
        transformer_config(layout, torch.bfloat16, bridge.spec, "cpu"), bridge.spec, mtp=True
    )
    fill(named_parameters(chunks))
    if job["create"]:
        bridge.save(chunks, job["create"])
    else:
        result = Path(f"{job['result']}.{job['rank']}")
        result.write_text(json.dumps(measure(job, bridge, chunks)))
    shutdown_megatron()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
