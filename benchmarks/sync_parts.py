"""The three processes of the sync benchmark."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.bridge_models import prepare

HOST = "127.0.0.1"
WAYS = ("ours", "broadcast", "disk", "one by one", "load alone")
_PLAIN_BUCKET = 16 << 20


def write_model(model: str, directory: Path) -> None:
    """A checkpoint of random weights, or the real SmolLM2 where it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if prepare(model, directory, directory):
        config = AutoConfig.from_pretrained(directory)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found = {
        # A copy: pages of the file would count as memory when they are first read.
        name: tensor.to(torch.bfloat16, copy=True)
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return dict(sorted(found.items()))


def _plans(tensors: dict[str, torch.Tensor], bucket_bytes: int) -> tuple[Any, Any]:
    from bridge.layouts import region_of
    from bridge.plan import Piece, Plan, TensorInfo
    from bridge.sync_plan import cut_plan

    infos = tuple(TensorInfo(name=n, dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items())
    pieces = {
        info.name: (
            Piece(
                tensor=info.name,
                region=region_of(info.shape),
                rank=0,
                parameter=info.name,
                local_region=region_of(info.shape),
            ),
        )
        for info in infos
    }
    plan = Plan(tensors=infos, pieces=pieces)
    return plan, cut_plan(plan, bucket_bytes)


class _Peak:
    """Resident memory of this process: the highest while the body runs, over `before`."""

    def __init__(self, before: int) -> None:
        self.extra = 0
        self._before = before
        self._done = threading.Event()

    def __enter__(self) -> "_Peak":
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self.extra = max(self.extra, _resident() - self._before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _plain_pieces(nbytes: int) -> Iterator[int]:
    for start in range(0, nbytes, _PLAIN_BUCKET):
        yield min(_PLAIN_BUCKET, nbytes - start)


def trainer_main(job: dict[str, Any], results: Any) -> None:
    """A rank that owns all tensors."""
    from safetensors.torch import save_file

    from bridge.fingerprint import fingerprint
    from bridge.sender import Sender
    from bridge.transport.gloo import connect

    torch.set_num_threads(1)
    tensors = _tensors(Path(job["model"]))
    plan, sync_plan = _plans(tensors, job["bucket_bytes"])
    before = _resident()
    sender = Sender(tensors, plan, sync_plan, 0)
    bridge = connect(HOST, job["ports"][0], 1, 2, 600)
    everyone = connect(HOST, job["ports"][2], 1, 3, 600)
    memory = torch.ones(max(_PLAIN_BUCKET, 1), dtype=torch.uint8)
    go = torch.empty(1, dtype=torch.uint8)
    extra, hashing = 0, []
    busy: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(job["repetitions"] + 1):
        for way in WAYS:
            everyone.broadcast(go, 0)
            start = time.process_time()
            if way == "ours":
                # Later the other ways have left memory behind.
                with _Peak(before) if not extra else nullcontext() as peak:
                    for number in sender.buckets:
                        bridge.send(sender.pack(number), 0)
                extra = peak.extra if peak else extra
            elif way == "broadcast":
                for size in _plain_pieces(sync_plan.nbytes):
                    everyone.broadcast(memory[:size], 0)
            elif way == "disk":
                folder = Path(job["scratch"]) / "reload"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(job["model"], folder, ignore=shutil.ignore_patterns("*.safetensors*"))
                save_file(tensors, folder / "model.safetensors")
                everyone.send(go, 2)
            elif way == "one by one":
                for tensor in tensors.values():
                    bridge.send(tensor.view(-1).view(torch.uint8), 0)
            everyone.recv(go, 2)  # the engine is ready
            busy[way].append(time.process_time() - start)
            if way == "ours":
                start = time.perf_counter()
                for tensor in tensors.values():
                    fingerprint(tensor.view(-1).view(torch.uint8))
                hashing.append(time.perf_counter() - start)
    results.put({"trainer_extra": extra, "hash_seconds": hashing[1:], "trainer_busy": busy})
    everyone.recv(go, 0)


def bridge_main(job: dict[str, Any], results: Any) -> None:
    """The bridge, which also says when to start."""
    from bridge.relay import Relay
    from bridge.sync_protocol import SyncOrder
    from bridge.transport.gloo import connect

    torch.set_num_threads(1)
    tensors = _tensors(Path(job["model"]))
    _, sync_plan = _plans(tensors, job["bucket_bytes"])
    sizes = [tensor.nbytes for tensor in tensors.values()]
    del tensors
    before = _resident()
    relay = Relay(sync_plan, keep=False)
    trainers = connect(HOST, job["ports"][0], 0, 2, 600)
    engines = connect(HOST, job["ports"][1], 0, 2, 600)
    everyone = connect(HOST, job["ports"][2], 0, 3, 600)
    memory = torch.ones(max(_PLAIN_BUCKET, *sizes), dtype=torch.uint8)
    go = torch.zeros(1, dtype=torch.uint8)
    extra = 0
    busy: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(job["repetitions"] + 1):
        for way in WAYS:
            everyone.broadcast(go, 0)
            start = time.process_time()
            if way == "ours":
                with _Peak(before) if not extra else nullcontext() as peak:
                    relay.forward(trainers, engines, SyncOrder(version=turn), (1,), ("engine",))
                extra = peak.extra if peak else extra
            elif way == "broadcast":
                for size in _plain_pieces(sync_plan.nbytes):
                    everyone.broadcast(memory[:size], 0)
            elif way == "one by one":
                for size in sizes:
                    trainers.recv(memory[:size], 1)
                    engines.broadcast(memory[:size], 0)
            everyone.recv(go, 2)
            busy[way].append(time.process_time() - start)
    results.put(
        {
            "bridge_extra": extra,
            "bridge_busy": busy,
            "nbytes": sync_plan.nbytes,
            "buckets": len(sync_plan.buckets),
            "largest_bucket": sync_plan.largest_bucket,
        }
    )
    everyone.send(go, 1)
    everyone.send(go, 2)


def engine_main(job: dict[str, Any], results: Any) -> None:
    """A vLLM engine in this process. Times are taken here: the others start when it does."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM

    llm = LLM(
        job["model"],
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        # Nothing is sampled, and a model of random weights has none.
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=True,
        weight_transfer_config={"backend": "gloo"},
    )
    from bridge.sync_plan import to_wire

    tensors = _tensors(Path(job["model"]))
    _, sync_plan = _plans(tensors, job["bucket_bytes"])
    receiver = _Receiver(llm, tensors, sync_plan, job)
    receiver.join(to_wire(sync_plan))
    go = torch.empty(1, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    busy: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(job["repetitions"] + 1):
        for way in WAYS:
            receiver.everyone.broadcast(go, 0)
            before, start = time.perf_counter(), time.process_time()
            receiver.ways[way](turn)
            busy[way].append(time.process_time() - start)
            if turn:
                seconds[way].append(time.perf_counter() - before)
            for rank in (0, 1):
                receiver.everyone.send(go, rank)
    results.put({**seconds, "engine_busy": busy})
    receiver.everyone.recv(go, 0)


class _Receiver:
    """The ways, as the engine sees them."""

    def __init__(
        self, llm: Any, tensors: dict[str, torch.Tensor], sync_plan: Any, job: dict[str, Any]
    ) -> None:
        self._llm = llm
        self._tensors = tensors
        self._plan = sync_plan
        self._job = job
        self._memory = torch.ones(_PLAIN_BUCKET, dtype=torch.uint8)
        self._worker = llm.llm_engine.model_executor.driver_worker
        self.everyone: Any
        self.ways: dict[str, Callable[[int], None]] = {
            "ours": self._ours,
            "broadcast": self._broadcast,
            "disk": self._disk,
            "one by one": self._one_by_one,
            "load alone": self._load_alone,
        }

    def join(self, wire: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        from bridge.transport.gloo import connect

        info = {
            "host": HOST,
            "port": self._job["ports"][1],
            "rank_offset": 1,
            "world_size": 2,
            "timeout_s": 600,
            "plan": wire,
            "peers": ["bridge", "engine"],
        }
        self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        self.everyone = connect(HOST, self._job["ports"][2], 2, 3, 600)

    def _ours(self, turn: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._llm.start_weight_update()
        self._llm.update_weights(WeightTransferUpdateRequest(update_info={"version": turn}))
        self._llm.finish_weight_update(str(turn))

    def _broadcast(self, turn: int) -> None:
        for size in _plain_pieces(self._plan.nbytes):
            self.everyone.broadcast(self._memory[:size], 0)

    def _disk(self, turn: int) -> None:
        go = torch.empty(1, dtype=torch.uint8)
        self.everyone.recv(go, 1)
        folder = str(Path(self._job["scratch"]) / "reload")
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    def _one_by_one(self, turn: int) -> None:
        group = self._engine._group

        def received() -> Iterator[tuple[str, torch.Tensor]]:
            for name, like in self._tensors.items():
                buffer = torch.empty(like.nbytes, dtype=torch.uint8)
                group.broadcast(buffer, 0)
                yield name, buffer.view(like.dtype).view(like.shape)

        self._load(iter([pair]) for pair in received())

    def _load_alone(self, turn: int) -> None:
        self._load([iter(self._tensors.items())])

    @property
    def _engine(self) -> Any:
        return self._worker.worker.weight_transfer_engine

    def _load(self, calls: Iterable[Iterator[tuple[str, torch.Tensor]]]) -> None:
        """As vLLM reloads: the engine's own way would copy without the loaders."""
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        from bridge.transport.vllm_fixes import repack_tied_lm_head

        engine = self._engine
        initialize_layerwise_reload(engine.model)
        for weights in calls:
            engine.model.load_weights(weights)
        finalize_layerwise_reload(engine.model, engine.model_config)
        repack_tied_lm_head(engine.model)
