"""`bascule export`: safetensors to a Megatron torch_dist checkpoint, and back, on as many ranks as asked."""

import os
import time
from pathlib import Path
from typing import Any

import torch

from actors import deadline
from actors.adapter_source import AdapterSource, read_adapter, read_mcore_adapter
from actors.checkpoint_files import find_iteration
from actors.cluster import connect
from actors.console import Console
from actors.env import check_one_source, resolve_device
from actors.export_rank import ExportRank, Task
from actors.model_source import ModelSource, find_model, load_tokenizer, model_size, tensors_of
from actors.placement import Reservation, export_bundles, reserve
from actors.precision import SampleBatch, compare_logits, reference_logits, sample_tokens
from actors.ranks import start_ranks
from bridge.checkpoint_writer import progress
from bridge.families import spec_of
from bridge.fit import check_layout
from bridge.model_bridge import ModelBridge
from bridge.parameters import check_tensors
from bridge.partial_directory import (
    check_replaceable,
    check_writable,
    make_partial,
    partial_of,
    put_in_place,
)
from bridge.rules import MegatronSpec
from configs.errors import ConfigError
from configs.export import ExportConfig

_SAMPLE_TOKENS = 256


class _Ranks:
    """All ranks of an export."""

    def __init__(self, task: Task, reservation: Reservation) -> None:
        self._cluster = task.config.cluster
        count = task.config.layout.world_size
        self._names = [f"export rank {rank}" for rank in range(count)]
        self._actors = start_ranks(ExportRank, reservation, "export", count, (task,))

    def load(self) -> tuple[str, ...]:
        timeout_s = self._cluster.start_timeout_s
        address = deadline.get(
            self._actors[0].address.remote(), self._names[0], timeout_s=timeout_s, phase="start of the ranks"
        )
        return self._all("load", "load", address, timeout_s=timeout_s)[0]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return self._all(method, f"export: {method}", *arguments, timeout_s=self._cluster.step_timeout_s)

    def _all(self, method: str, phase: str, *arguments: Any, timeout_s: float) -> list[Any]:
        refs = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        return deadline.get_all(refs, self._names, timeout_s=timeout_s, phase=phase)


def export(config: ExportConfig, console: Console) -> dict[str, Any]:
    """Convert as the config says. Returns what was done, with `passed`: whether the precision test did.

    Raises BasculeError; the output directory then is as it was. What was written until then may be left beside
    it (see bridge.partial_directory); safetensors are continued from there by the same command.
    """
    check_one_source()
    source = find_model(config.model, config.mcore_model, "model")
    output = config.output_dir.resolve()
    tensors = tensors_of(source)
    adapter = _find_adapter(config, ModelBridge(source.directory, tensors))
    check_output(source, output, exist_ok=config.exist_ok, adapter=adapter)
    family, spec = spec_of(source.directory)
    check_layout(spec, config.layout, training=False)
    if tensors is not None:
        has_mtp = any(family.is_extra_layer(spec, name) for name in tensors)
        check_tensors(family, spec, tensors, source.directory, mtp=has_mtp)
    sample = _sample(config, source, spec) if config.test_convert_precision else None
    device = resolve_device(config.device)
    task = Task(
        config=config,
        source=source,
        adapter=adapter,
        device=device,
        output=output,
        key=_key(config, source, adapter),
    )
    bundles = export_bundles(config, model_size(source, tensors), device)
    with connect(config.cluster) as cluster:
        reservation = reserve(
            bundles, timeout_s=config.cluster.placement_timeout_s, can_grow=not cluster.local
        )
        ranks = _Ranks(task, reservation)
        not_finite = _convert(task, ranks, console)
        passed = sample is None or _test(task, sample, ranks, console)
    written = finish(output, passed, console)
    return {"output_dir": str(written), "not_finite": list(not_finite), "passed": passed}


def _find_adapter(config: ExportConfig, base: ModelBridge) -> AdapterSource | None:
    if config.adapters is not None:
        return read_adapter(config.adapters, base, "adapters")
    if config.mcore_adapter is not None:
        return read_mcore_adapter(config.mcore_adapter, base, "mcore_adapter")
    return None


def check_output(
    source: ModelSource, output: Path, *, exist_ok: bool, adapter: AdapterSource | None = None
) -> None:
    """Raises ConfigError when `output` cannot be written, or would replace what is not to be lost."""
    read = [source.directory, *([] if source.mcore is None else [find_iteration(source.mcore)])]
    read += _places(adapter)
    # Files too: they may be links to where the output is to go.
    for path in [*read, *(file for directory in read for file in directory.iterdir() if file.is_file())]:
        place = path.resolve()
        if output in (place, *place.parents):
            raise ConfigError(
                f"output_dir: {output} is or holds {path}, which is read, and so is never replaced"
            )
    if os.path.lexists(output) and not exist_ok:
        raise ConfigError(f"output_dir: {output} exists; choose another, or set exist_ok to replace it")
    try:
        check_replaceable(output)
        check_writable(output)
    except ConfigError as error:
        raise ConfigError(f"output_dir: {error}") from error


def finish(output: Path, passed: bool, console: Console) -> Path:
    """Rename what was written to `output`, unless it failed its test and would replace something.

    Returns where it is. Raises WriteError.
    """
    if not passed and output.exists():
        written = partial_of(output)
        console.line(
            f"{output} stays as it was; {written}, which failed the test, is left for you to look at"
        )
        return written
    put_in_place(output)
    console.line(f"renamed it to {output}")
    return output


def _places(adapter: AdapterSource | None) -> list[Path]:
    """Where an adapter is read from."""
    if adapter is None:
        return []
    return [path for path in (adapter.directory, adapter.mcore and find_iteration(adapter.mcore)) if path]


def _key(config: ExportConfig, source: ModelSource, adapter: AdapterSource | None) -> str:
    read = [source.directory if source.mcore is None else find_iteration(source.mcore), *_places(adapter)]
    changed = [max(path.stat().st_mtime_ns for path in directory.iterdir()) for directory in read]
    return f"{read} {changed} {config.layout.model_dump_json()} {config.torch_dtype} {config.max_shard_size}"


def _sample(config: ExportConfig, source: ModelSource, spec: MegatronSpec) -> SampleBatch:
    has_tokenizer = any(source.directory.glob("tokenizer*"))
    return sample_tokens(
        load_tokenizer(source.directory) if has_tokenizer else None,
        spec.vocab_size,
        config.seed,
        max_length=min(_SAMPLE_TOKENS, spec.max_sequence_length),
        multiple_of=config.layout.tensor_model_parallel_size,
        vision=spec.vision,
    )


def _convert(task: Task, ranks: _Ranks, console: Console) -> tuple[str, ...]:
    """Write all of the output into its partial directory. Returns names of tensors with NaN or infinities."""
    start = time.monotonic()
    not_finite = ranks.load()
    console.line(f"loaded {task.source.mcore or task.source.directory} in {time.monotonic() - start:.1f} s")
    if not_finite:
        console.line(f"warning: NaN or infinities in {', '.join(not_finite)}")
    start = time.monotonic()
    if task.config.to_mcore:
        make_partial(task.output)
    elif found := progress(task.output, task.key, task.config.layout.world_size):
        done, of = found
        console.line(f"continuing an interrupted save: {done} of {of} tensors were written")
    ranks.call("write")
    console.line(f"wrote {partial_of(task.output)} in {time.monotonic() - start:.1f} s")
    return not_finite


def _reference_logits(task: Task, sample: SampleBatch, dtype: torch.dtype) -> torch.Tensor:
    """Those of transformers: of the output where it is a model, else of the source, with the adapter in it."""
    to_hf, written = task.config.to_hf, partial_of(task.output)
    if to_hf and not task.only_adapter:
        return reference_logits(written, sample.tokens, dtype, task.device, shown=sample.shown)
    adapter = None if task.adapter is None else written if to_hf else task.adapter.directory
    source = task.source.directory
    return reference_logits(source, sample.tokens, dtype, task.device, adapter, sample.shown)


def _test(task: Task, sample: SampleBatch, ranks: _Ranks, console: Console) -> bool:
    """The precision test: every tensor bit for bit, then logits against transformers'."""
    config = task.config
    verified = ranks.call("verify")
    differ = sorted({name for _, names in verified for name in names})
    count = verified[0][0]
    cast = "" if config.torch_dtype is None else f" after a cast to {config.torch_dtype}"
    console.line(f"round trip: {count - len(differ)} of {count} tensors are the same bit for bit{cast}")
    if differ:
        console.line(f"these differ: {', '.join(differ)}")
    logits = next(found for found in ranks.call("logits", sample) if found is not None)
    expected = _reference_logits(task, sample, logits.dtype)
    report = compare_logits(expected, logits[None], sample.loss_mask)
    for line in report.lines():
        console.line(line)
    passed = not differ and report.passes(config.precision_threshold)
    console.line(
        f"precision test {'passed' if passed else 'FAILED'} (threshold {config.precision_threshold:g})"
    )
    return passed
