"""`bascule export`: safetensors to a Megatron torch_dist checkpoint, and back, on as many ranks as asked."""

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from actors import deadline
from actors.checkpoint_files import find_iteration, replace_directory
from actors.cluster import connect
from actors.env import check_one_source, resolve_device
from actors.metrics import Console
from actors.model_source import ModelSource, find_model, model_size, tensors_of, write_beside
from actors.placement import Reservation, export_bundles, reserve
from actors.precision import SampleBatch, compare_logits, reference_logits, sample_tokens
from actors.ranks import free_address, join, start_ranks
from algorithms.data import MicroBatch, float_row, int_row
from bridge.families import spec_of
from bridge.fit import check_layout
from bridge.plan import TORCH_DTYPES
from configs.errors import BasculeError, ConfigError
from configs.export import ExportConfig

if TYPE_CHECKING:
    from actors.megatron_model import FrozenModel
    from actors.megatron_setup import Device
    from bridge.model_bridge import ModelBridge

_ITERATION = 1
_SAMPLE_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What all ranks of an export are told."""

    config: ExportConfig
    source: ModelSource
    device: str
    target: Path


class ExportRank:
    """One Megatron rank of an export."""

    def __init__(self, task: Task, rank: int) -> None:
        """Remembers only what it will be."""
        self._task = task
        self._rank = rank
        self._bridge: ModelBridge
        self._model: FrozenModel

    def address(self) -> str:
        """A rendezvous for all ranks."""
        return free_address()

    def load(self, address: str) -> tuple[str, ...]:
        """Join the group, build the model, load the weights. Returns names of tensors with NaN."""
        task = self._task
        layout = task.config.layout
        join(
            layout,
            task.config.cluster,
            rank=self._rank,
            address=address,
            device=task.device,
            seed=task.config.seed,
        )
        from actors.megatron_model import FrozenModel
        from bridge.model_bridge import ModelBridge

        self._bridge = ModelBridge(task.source.directory, tensors_of(task.source))
        self._model = FrozenModel(
            layout,
            self._parameter_dtype(),
            self._bridge.spec,
            device=cast("Device", task.device),
            load=lambda chunks: None,
            mtp=self._with_mtp(),
        )
        if task.source.mcore is not None:
            from actors.megatron_checkpoint import load_torch_dist

            load_torch_dist(self._model.chunks, task.source.mcore)
            return ()
        return self._bridge.load(self._model.chunks).nan

    def _with_mtp(self) -> bool:
        """Whether there are weights for the layers for multi-token prediction."""
        mcore = self._task.source.mcore
        if mcore is None:
            return self._bridge.has_mtp
        from actors.megatron_checkpoint import holds

        return holds(mcore, "mtp.")

    def _parameter_dtype(self) -> torch.dtype:
        return (
            TORCH_DTYPES[self._task.config.torch_dtype]
            if self._task.config.torch_dtype
            else self._bridge.dtype
        )

    def _written_dtype(self) -> torch.dtype | None:
        name = self._task.config.torch_dtype
        return None if name is None else TORCH_DTYPES[name]

    def write(self, key: str) -> None:
        """Write the target; every rank does it together."""
        config, target = self._task.config, self._task.target
        if config.to_hf:
            self._bridge.save(
                self._model.chunks,
                target,
                torch_dtype=self._written_dtype(),
                max_shard_size=config.max_shard_bytes,
                key=key,
            )
            return
        from actors.megatron_checkpoint import save_torch_dist

        save_torch_dist(
            self._model.chunks,
            target,
            iteration=_ITERATION,
            write_beside=partial(write_beside, target, self._bridge, mtp=True),
        )

    def verify(self, output: Path) -> tuple[int, list[str]]:
        """Number of tensors, and names of those that are not, bit for bit, what they should be.

        After to_mcore: what is read back from the checkpoint, as HF tensors, against the source. After to_hf:
        the written files against the live model.
        """
        from actors.megatron_checkpoint import load_torch_dist
        from bridge.checkpoint import CheckpointReader
        from bridge.megatron import named_parameters

        config = self._task.config
        if config.to_mcore:
            for parameter in named_parameters(self._model.chunks).values():
                # So that what is not read back shows.
                parameter.detach().fill_(torch.nan)
            load_torch_dist(self._model.chunks, output)
        count, differ = 0, []
        with CheckpointReader(output if config.to_hf else self._bridge.directory) as reader:
            for name, tensor in self._bridge.export(self._model.chunks, self._written_dtype()):
                count += 1
                # Every rank has every tensor; each compares its share.
                if count % config.layout.world_size == self._rank and not _same(reader, name, tensor):
                    differ.append(name)
        return count, differ

    def logits(self, sample: SampleBatch) -> torch.Tensor | None:
        """Logits [S, V] of the sample in the model's type, from the last pipeline stage."""
        found = self._model.logits([_one_row(sample)])
        return None if found is None else found[0].cpu()


def _same(reader: Any, name: str, tensor: torch.Tensor) -> bool:
    from bridge.layouts import region_of

    stored = reader.read(name, region_of(tuple(tensor.shape))).to(tensor.dtype)
    return torch.equal(stored.view(torch.uint8), tensor.view(torch.uint8))


def _one_row(sample: SampleBatch) -> MicroBatch:
    tokens = sample.tokens[0].tolist()
    return MicroBatch(
        tokens_T=int_row(tokens),
        labels_T=int_row(sample.labels[0].tolist()),
        positions_T=int_row(range(len(tokens))),
        starts_S=int_row([0, len(tokens)]),
        loss_mask_T=int_row(sample.loss_mask[0].tolist()),
        advantages_T=float_row([0.0] * len(tokens)),
        logprobs_T=float_row([0.0] * len(tokens)),
    )


class _Ranks:
    """All ranks of an export."""

    def __init__(self, task: Task, reservation: Reservation) -> None:
        self._cluster = task.config.cluster
        count = task.config.layout.world_size
        self._names = [f"export rank {rank}" for rank in range(count)]
        self._actors = start_ranks(ExportRank, reservation, "export", count, (task,))

    def load(self) -> list[tuple[str, ...]]:
        timeout_s = self._cluster.start_timeout_s
        address = deadline.get(
            self._actors[0].address.remote(), self._names[0], timeout_s=timeout_s, phase="start of the ranks"
        )
        return self._all("load", "load", address, timeout_s=timeout_s)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return self._all(method, f"export: {method}", *arguments, timeout_s=self._cluster.step_timeout_s)

    def _all(self, method: str, phase: str, *arguments: Any, timeout_s: float) -> list[Any]:
        refs = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        return deadline.get_all(refs, self._names, timeout_s=timeout_s, phase=phase)


def export(config: ExportConfig, console: Console) -> dict[str, Any]:
    """Convert as the config says. Returns what was done, with `passed`: whether the precision test did.

    Raises BasculeError; the output directory then is as it was, though one beside it, `.partial`, may be left
    that the same command continues.
    """
    check_one_source()
    source = find_model(config.model, config.mcore_model, "model")
    output = config.output_dir.resolve()
    if source.mcore is not None and find_iteration(source.mcore) == output:
        raise ConfigError(f"output_dir: {output} is what mcore_model is read from, which is never replaced")
    _, spec = spec_of(source.directory)
    check_layout(spec, config.layout, training=False)
    if output.exists() and not config.exist_ok:
        raise ConfigError(f"output_dir: {output} exists; choose another, or set exist_ok to replace it")
    device = resolve_device(config.device)
    size = model_size(source)
    task = Task(config=config, source=source, device=device, target=_target(config, output))
    with connect(config.cluster) as cluster:
        reservation = reserve(
            export_bundles(config, size, device),
            timeout_s=config.cluster.placement_timeout_s,
            can_grow=not cluster.local,
        )
        ranks = _Ranks(task, reservation)
        result = _convert(task, ranks, console, output)
        result["passed"] = _check(task, ranks, console) if config.test_convert_precision else True
    return result


def _target(config: ExportConfig, output: Path) -> Path:
    """Where the ranks write: safetensors have a partial directory of their own, torch_dist gets one here."""
    return output if config.to_hf else output.with_name(output.name + ".partial")


def _convert(task: Task, ranks: _Ranks, console: Console, output: Path) -> dict[str, Any]:
    start = time.monotonic()
    loaded = ranks.load()
    console.line(f"loaded {task.source.mcore or task.source.directory} in {time.monotonic() - start:.1f} s")
    nan = sorted({name for names in loaded for name in names})
    if nan:
        console.line(f"warning: not all values are numbers in {', '.join(nan)}")
    start = time.monotonic()
    if task.config.to_mcore:
        shutil.rmtree(task.target, ignore_errors=True)
    ranks.call("write", _key(task))
    if task.config.to_mcore:
        replace_directory(task.target, output)
    console.line(f"wrote {output} in {time.monotonic() - start:.1f} s")
    return {"output_dir": str(output), "nan": nan}


def _key(task: Task) -> str:
    """What decides every byte that each rank writes, so that an interrupted save can be continued."""
    read = find_iteration(task.source.mcore) if task.source.mcore is not None else task.source.directory
    changed = max(path.stat().st_mtime_ns for path in read.iterdir())
    config = task.config
    return f"{read} {changed} {config.layout.model_dump_json()} {config.torch_dtype} {config.max_shard_size}"


def _check(task: Task, ranks: _Ranks, console: Console) -> bool:
    """The precision test: every tensor bit for bit, then logits against transformers'."""
    config = task.config
    output = config.output_dir.resolve()
    verified = ranks.call("verify", output)
    differ = sorted({name for _, names in verified for name in names})
    count = verified[0][0]
    console.line(f"round trip: {count - len(differ)} of {count} tensors are the same bit for bit")
    if differ:
        console.line(f"these differ: {', '.join(differ)}")
    directory = output if config.to_hf else task.source.directory
    _, spec = spec_of(directory)
    sample = sample_tokens(
        _tokenizer(directory),
        spec.vocab_size,
        config.seed,
        max_length=min(_SAMPLE_TOKENS, spec.max_sequence_length),
        multiple_of=config.layout.tensor_model_parallel_size,
    )
    logits = next(found for found in ranks.call("logits", sample) if found is not None)
    expected = reference_logits(directory, sample.tokens, logits.dtype, task.device)
    report = compare_logits(expected, logits[None], sample.loss_mask)
    for line in report.lines():
        console.line(line)
    passed = not differ and report.passes(config.precision_threshold)
    console.line(
        f"precision test {'passed' if passed else 'FAILED'} (threshold {config.precision_threshold:g})"
    )
    return passed


def _tokenizer(directory: Path) -> Any | None:
    """The directory's tokenizer, if it has one that loads."""
    from transformers import AutoTokenizer

    if not any(directory.glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    # The files are foreign, and so is what reads them: a broken one may raise anything.
    except Exception as error:
        raise BasculeError(f"{directory}: its tokenizer cannot be loaded: {error!r}") from error
