"""One Megatron rank of an export: it loads its shard, writes it, and reads back what was written."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from actors.adapter_source import AdapterSource, fill_adapter, write_adapter_beside
from actors.model_source import ModelSource, tensors_of, write_beside
from actors.precision import SampleBatch
from actors.ranks import free_address, join
from algorithms.data import MicroBatch, float_row, int_row
from bridge.adapter_config import ADAPTER_WEIGHTS
from bridge.checkpoint import CheckpointReader
from bridge.fingerprint import fingerprint
from bridge.layouts import region_of
from bridge.partial_directory import partial_of
from bridge.plan import TORCH_DTYPES
from configs.export import ExportConfig
from configs.sizes import parse_size

if TYPE_CHECKING:
    from actors.megatron_model import FrozenModel
    from actors.megatron_setup import Device
    from bridge.adapter_bridge import AdapterBridge
    from bridge.model_bridge import ModelBridge

_ITERATION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What all ranks of an export are told."""

    config: ExportConfig
    source: ModelSource
    adapter: AdapterSource | None
    """Converted in place of the model, or merged into it."""
    device: str
    output: Path
    """The ranks write into partial_of(output)."""
    key: str
    """What decides every byte that each rank writes to safetensors."""

    @property
    def only_adapter(self) -> bool:
        """Whether an adapter is what is converted."""
        return self.adapter is not None and not self.config.merge_lora

    @property
    def written_dtype(self) -> torch.dtype | None:
        """The type that is asked for."""
        name = self.config.torch_dtype
        return None if name is None else TORCH_DTYPES[name]


class ExportRank:
    """One Megatron rank of an export."""

    def __init__(self, task: Task, rank: int) -> None:
        """Remembers only what it will be."""
        self._task = task
        self._rank = rank
        self._bridge: ModelBridge
        self._adapters: AdapterBridge
        self._model: FrozenModel

    def address(self) -> str:
        """A rendezvous for all ranks."""
        return free_address()

    def load(self, address: str) -> tuple[str, ...]:
        """Join the group, build the model, load the weights. Returns names of tensors with NaN or infinities."""
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
        from actors.megatron_checkpoint import load_torch_dist
        from actors.megatron_model import FrozenModel
        from bridge.model_bridge import ModelBridge

        self._bridge = ModelBridge(task.source.directory, tensors_of(task.source))
        self._model = FrozenModel(
            layout,
            task.written_dtype or self._bridge.dtype,
            self._bridge.spec,
            device=cast("Device", task.device),
            load=lambda chunks: None,
            mtp=self._with_mtp(),
        )
        if task.source.mcore is not None:
            load_torch_dist(self._model.chunks, task.source.mcore)
        else:
            self._bridge.load(self._model.chunks)
        not_finite = () if task.adapter is None else self._load_adapter(task.adapter)
        # Of the model and not of the files: a cast to a narrower type may have made infinities.
        return (*not_finite, *self._bridge.not_finite(self._model.chunks))

    def _load_adapter(self, adapter: AdapterSource) -> tuple[str, ...]:
        from actors.megatron_lora import merge

        self._adapters = adapter.bridge(self._bridge)
        chunks = self._model.chunks
        # Exactly as it is stored: the model may be of a narrower type.
        found = fill_adapter(self._adapters, adapter, 0, list(chunks), dtype=adapter.dtype)
        if self._task.config.merge_lora:
            merge(chunks, self._adapters.merged(chunks))
        return found

    def _with_mtp(self) -> bool:
        """Whether there are weights for the layers for multi-token prediction."""
        mcore = self._task.source.mcore
        if mcore is None:
            return self._bridge.has_mtp
        from actors.megatron_checkpoint import holds

        return holds(mcore, "mtp.")

    def write(self) -> None:
        """Write all of the output; every rank does it together."""
        if self._task.only_adapter:
            self._write_adapter()
        elif self._task.config.to_hf:
            self._bridge.save(
                self._model.chunks,
                self._task.output,
                torch_dtype=self._task.written_dtype,
                max_shard_size=parse_size(self._task.config.max_shard_size),
                key=self._task.key,
                publish=False,
            )
        else:
            from actors.megatron_checkpoint import save_torch_dist

            directory, dtype = partial_of(self._task.output), self._task.written_dtype
            save_torch_dist(
                self._model.chunks,
                directory,
                iteration=_ITERATION,
                write_beside=partial(write_beside, directory, self._bridge, torch_dtype=dtype, mtp=True),
            )

    def _write_adapter(self) -> None:
        task, chunks = self._task, self._model.chunks
        if task.config.to_hf:
            self._adapters.save(chunks, task.output, torch_dtype=task.written_dtype, publish=False)
            return
        from actors.megatron_adapter_checkpoint import save_adapter

        assert task.adapter is not None, "it is what is written"
        directory, base = partial_of(task.output), self._bridge.directory
        plan = self._adapters.plan(chunks, task.written_dtype)
        beside = partial(write_adapter_beside, directory, task.adapter, base, plan)
        save_adapter(chunks, directory, iteration=_ITERATION, write_beside=beside)

    def verify(self) -> tuple[int, list[str]]:
        """Number of tensors, and names of those that are not, bit for bit, what they should be.

        After to_mcore: what is read back from the checkpoint, as HF tensors, against the source, or where an
        adapter was merged against what was written. After to_hf: the written files against the live model.
        """
        config, written = self._task.config, partial_of(self._task.output)
        expected = dict(self._contents()) if config.to_mcore and config.merge_lora else {}
        if config.to_mcore:
            self._read_back(written)
        if expected:
            found = dict(self._contents())
            return len(found), sorted(name for name in found if found[name] != expected[name])
        count, differ = 0, []
        with self._reader(written if config.to_hf else None) as reader:
            for name, tensor in self._export():
                count += 1
                # Every rank has every tensor; each compares its share.
                if count % config.layout.world_size == self._rank and not _same(reader, name, tensor):
                    differ.append(name)
        return count, differ

    def _export(self) -> Iterator[tuple[str, torch.Tensor]]:
        bridge = self._adapters if self._task.only_adapter else self._bridge
        return bridge.export(self._model.chunks, self._task.written_dtype)

    def _contents(self) -> Iterator[tuple[str, int]]:
        """A hash of every tensor."""
        for name, tensor in self._export():
            yield name, fingerprint(tensor.flatten().view(torch.uint8))

    def _read_back(self, written: Path) -> None:
        from bridge.megatron import adapter_parameters, named_parameters

        chunks, only_adapter = self._model.chunks, self._task.only_adapter
        for parameter in (adapter_parameters if only_adapter else named_parameters)(chunks).values():
            # So that what is not read back shows.
            parameter.detach().fill_(torch.nan)
        if only_adapter:
            from actors.megatron_adapter_checkpoint import load_adapter

            load_adapter(chunks, written)
        else:
            from actors.megatron_checkpoint import load_torch_dist

            load_torch_dist(chunks, written)

    def _reader(self, written: Path | None) -> CheckpointReader:
        """Of the written files, or of the source."""
        if not self._task.only_adapter:
            return CheckpointReader(written or self._bridge.directory)
        directory = written or self._adapters.source
        assert directory is not None, "only what is in safetensors is converted to torch_dist"
        return CheckpointReader(directory, ADAPTER_WEIGHTS)

    def logits(self, sample: SampleBatch) -> torch.Tensor | None:
        """Logits [S, V] of the sample in the model's type, from the last pipeline stage."""
        if (shown := sample.shown) is not None:
            self._model.look = lambda pictures: shown.patches_PC
        found = self._model.logits([_one_row(sample)])
        return None if found is None else found[0].cpu()


def _same(reader: CheckpointReader, name: str, tensor: torch.Tensor) -> bool:
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
        vision=None if sample.shown is None else sample.shown.vision,
    )
