"""One Megatron rank of an export: it loads its shard, writes it, and reads back what was written."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from actors.model_source import ModelSource, tensors_of, write_beside
from actors.precision import SampleBatch
from actors.ranks import free_address, join
from algorithms.data import MicroBatch, float_row, int_row
from bridge.checkpoint import CheckpointReader
from bridge.layouts import region_of
from bridge.partial_directory import partial_of
from bridge.plan import TORCH_DTYPES
from configs.export import ExportConfig
from configs.sizes import parse_size

if TYPE_CHECKING:
    from actors.megatron_model import FrozenModel
    from actors.megatron_setup import Device
    from bridge.model_bridge import ModelBridge

_ITERATION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What all ranks of an export are told."""

    config: ExportConfig
    source: ModelSource
    device: str
    output: Path
    """The ranks write into partial_of(output)."""
    key: str
    """What decides every byte that each rank writes to safetensors."""

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
        # Of the model and not of the files: a cast to a narrower type may have made infinities.
        return self._bridge.not_finite(self._model.chunks)

    def _with_mtp(self) -> bool:
        """Whether there are weights for the layers for multi-token prediction."""
        mcore = self._task.source.mcore
        if mcore is None:
            return self._bridge.has_mtp
        from actors.megatron_checkpoint import holds

        return holds(mcore, "mtp.")

    def write(self) -> None:
        """Write all of the output; every rank does it together."""
        task = self._task
        if task.config.to_hf:
            self._bridge.save(
                self._model.chunks,
                task.output,
                torch_dtype=task.written_dtype,
                max_shard_size=parse_size(task.config.max_shard_size),
                key=task.key,
                publish=False,
            )
            return
        from actors.megatron_checkpoint import save_torch_dist

        directory = partial_of(task.output)
        save_torch_dist(
            self._model.chunks,
            directory,
            iteration=_ITERATION,
            write_beside=partial(
                write_beside, directory, self._bridge, torch_dtype=task.written_dtype, mtp=True
            ),
        )

    def verify(self) -> tuple[int, list[str]]:
        """Number of tensors, and names of those that are not, bit for bit, what they should be.

        After to_mcore: what is read back from the checkpoint, as HF tensors, against the source. After to_hf:
        the written files against the live model.
        """
        from actors.megatron_checkpoint import load_torch_dist
        from bridge.megatron import named_parameters

        config, written = self._task.config, partial_of(self._task.output)
        if config.to_mcore:
            for parameter in named_parameters(self._model.chunks).values():
                # So that what is not read back shows.
                parameter.detach().fill_(torch.nan)
            load_torch_dist(self._model.chunks, written)
        count, differ = 0, []
        with CheckpointReader(written if config.to_hf else self._bridge.directory) as reader:
            for name, tensor in self._bridge.export(self._model.chunks, self._task.written_dtype):
                count += 1
                # Every rank has every tensor; each compares its share.
                if count % config.layout.world_size == self._rank and not _same(reader, name, tensor):
                    differ.append(name)
        return count, differ

    def logits(self, sample: SampleBatch) -> torch.Tensor | None:
        """Logits [S, V] of the sample in the model's type, from the last pipeline stage."""
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
    )
