"""Load, export and save a live Megatron model as a Hugging Face checkpoint, on every rank together.

README.md shows how. A `model` is a Megatron module or a list of them (virtual pipeline stages); torch.distributed
and Megatron's process groups must be set up, and every rank makes the same calls.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from bridge.checkpoint import CheckpointError, CheckpointReader, all_finite
from bridge.checkpoint_writer import CheckpointWriter
from bridge.claims import claim_together, config_dtype, gather_claims, implied_tensors, plan_of
from bridge.exchange import Reader, Writer, load_pieces, reading_threads, save_pieces
from bridge.families import spec_of
from bridge.layouts import region_of, relative, slices
from bridge.megatron import (
    EMBEDDING,
    OUTPUT_LAYER,
    named_parameters,
)
from bridge.plan import Bucket, Piece, Plan, TensorInfo
from bridge.safetensors_file import CHUNK_BYTES, boxes
from bridge.together import (
    GuardedReader,
    GuardedWriter,
    all_everywhere,
    everywhere,
    exported,
    on_first_rank,
    raise_everywhere,
)
from configs.errors import ConfigError, WriteError

Model = torch.nn.Module | Sequence[torch.nn.Module]
BUCKET_BYTES = 64 << 20


class WeightError(ConfigError):
    """A checkpoint's values contradict themselves. Names the tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a load did on this rank. `not_finite` are names of tensors with NaN or infinities, of all ranks."""

    bytes_read: int
    not_finite: tuple[str, ...]


class ModelBridge:
    """The way between one Hugging Face checkpoint directory and models of its shape."""

    def __init__(
        self,
        directory: str | Path,
        tensors: Mapping[str, TensorInfo] | None = None,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Reads config.json, and the headers of the safetensors files if there are any.

        `tensors` say what is in the headers, which are then not read; without either, names and shapes follow
        from the model. Raises ConfigError or CheckpointError naming the file.
        """
        self.directory = Path(directory)
        self.family, self.spec = spec_of(self.directory)
        self._bucket_bytes = bucket_bytes
        self._tensors = tensors
        if tensors is None and any(self.directory.glob("*.safetensors")):
            with CheckpointReader(self.directory) as reader:
                self._tensors = dict(reader.tensors)

    @property
    def tensors(self) -> Mapping[str, TensorInfo] | None:
        """The checkpoint's tensors, if it is known what they are."""
        return self._tensors

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint has layers for multi-token prediction; many a copy is saved without them."""
        return any(self.family.is_extra_layer(self.spec, name) for name in self._tensors or ())

    @property
    def dtype(self) -> torch.dtype:
        """The one type that holds every value of the checkpoint's parameters; config.json's without tensors."""
        if self._tensors is None:
            return config_dtype(self.directory)
        dtypes = {info.dtype for name, info in self._tensors.items() if not self.family.stays_float32(name)}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def load(self, model: Model, directory: str | Path | None = None) -> Loaded:
        """Read every parameter of the model, by default from the directory of this bridge.

        Raises RuleError with everything in names and shapes that does not fit before a byte of weights is
        read, and WeightError when tensors that repeat one another (tied embeddings) differ.
        """
        parameters = named_parameters(chunks_of(model))
        device = next(iter(parameters.values())).device
        with CheckpointReader(self.directory if directory is None else Path(directory)) as reader:
            claims = claim_together(self.family, self.spec, parameters, reader.tensors, reader.directory)
            _zero_padding(parameters, claims.pieces)
            guarded = GuardedReader(reader)
            load_pieces(parameters, guarded, claims.pieces, reading_threads(device))
            bytes_read, not_finite = reader.bytes_read, sorted(reader.not_finite)
            differ = self._differing_copies(guarded, parameters, claims.pieces)
        failures, not_finite, differ = all_everywhere(guarded.failures, not_finite, differ)
        if failures:
            raise CheckpointError("; ".join(failures))
        if differ:
            raise WeightError(
                f"{reader.directory}: {'; '.join(differ)}, although this kind of model shares them; if the model "
                "has a head of its own, set tie_word_embeddings: false in config.json, else remove the copy"
            )
        return Loaded(bytes_read=bytes_read, not_finite=not_finite)

    def not_finite(self, model: Model) -> tuple[str, ...]:
        """Names of HF tensors of which the model holds NaN or infinities, the same on every rank."""
        rank = dist.get_rank()
        parameters = named_parameters(chunks_of(model))
        wrong = [name for name, parameter in parameters.items() if not all_finite(parameter.detach())]
        if not everywhere(wrong):
            return ()
        pieces = (piece for pieces in self.plan(model, copies=False).pieces.values() for piece in pieces)
        found = {
            piece.tensor
            for piece in pieces
            if piece.rank == rank
            and piece.parameter in wrong
            and not all_finite(piece.get(parameters[piece.parameter]))
        }
        return everywhere(sorted(found))

    def tensors_in(self, torch_dtype: torch.dtype | None) -> Mapping[str, TensorInfo] | None:
        """The checkpoint's tensors, if it is known what they are, in the types that `plan` gives them."""
        if self._tensors is None or torch_dtype is None:
            return self._tensors
        return {
            name: info if self.family.stays_float32(name) else replace(info, dtype=torch_dtype)
            for name, info in self._tensors.items()
        }

    def plan(self, model: Model, torch_dtype: torch.dtype | None = None, *, copies: bool = True) -> Plan:
        """Who owns what of `model` as HF tensors, in the types of the checkpoint or, where given, `torch_dtype`.

        Tensors that Megatron keeps in float32 (expert biases of routers) keep the checkpoint's type. The same
        on every rank. Tensors the model does not hold are not in it, and without `copies` neither are those
        that only repeat another, which no engine needs.
        """
        parameters = named_parameters(chunks_of(model))
        claims = gather_claims(self.family, self.spec, parameters, self._tensors, self.directory)
        tensors = self._tensors
        if tensors is None:
            tensors = implied_tensors(self.family, self.spec, claims, config_dtype(self.directory))
        return plan_of(self.family, self.spec, tensors, claims, torch_dtype, with_copies=copies)

    def export(
        self,
        model: Model,
        torch_dtype: torch.dtype | None = None,
        *,
        parameters: Mapping[str, torch.Tensor] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """HF names and whole tensors in host memory, in layer order, on every rank, a bucket at a time.

        `parameters` are exported in place of the model's own, whose names and shapes they have (bridge.merged).
        Every rank must go through to the end.
        """
        plan = self.plan(model, torch_dtype)
        yield from exported(plan, parameters or named_parameters(chunks_of(model)), self._bucket_bytes)

    def save(
        self,
        model: Model,
        directory: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        max_shard_size: int = 5 << 30,
        key: str | None = None,
        publish: bool = True,
        parameters: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write the model with the names, types and side files of this bridge's checkpoint.

        The directory appears whole, by rename, or not at all; an empty one or a checkpoint is replaced, anything
        else is a ConfigError. Without `publish` the renaming is left to the caller (put_in_place of
        bridge.partial_directory). An interrupted save is continued by one with the same `key`, which says which
        values are written (see CheckpointWriter). `parameters` are as for `export`. Needs a file system that all
        ranks share. Raises WriteError naming the file.
        """
        plan = self.plan(model, torch_dtype)
        carried, dequantized = self._carried(plan)
        rank = dist.get_rank()
        writer = CheckpointWriter(
            Path(directory), [*plan.tensors, *carried], max_shard_size=max_shard_size, rank=rank, key=key
        )
        on_first_rank(writer.prepare)
        guarded = GuardedWriter(writer)
        save_pieces(
            parameters or named_parameters(chunks_of(model)),
            guarded,
            self._unwritten(plan, writer),
            plan,
            rank,
        )
        with guarded:
            self._carry_over(guarded, carried[rank :: dist.get_world_size()])
            writer.close()
        raise_everywhere(guarded.failures, WriteError)
        on_first_rank(lambda: writer.finish(self.directory, dequantized=dequantized, publish=publish))

    def _unwritten(self, plan: Plan, writer: CheckpointWriter) -> list[Bucket]:
        """The buckets of which some rank has not committed its part, the same on every rank."""
        buckets = plan.buckets(self._bucket_bytes)
        if not writer.keeps_journal:
            return list(buckets)
        pending = set(writer.pending(info.name for info in plan.tensors))
        mine = [
            number
            for number, bucket in enumerate(buckets)
            if any(info.name in pending for info in bucket.tensors)
        ]
        return [buckets[number] for number in sorted(everywhere(mine))]

    def _carried(self, plan: Plan) -> tuple[list[TensorInfo], bool]:
        """Tensors of the checkpoint that the model does not hold, which a save copies as they are; and whether
        others were dequantized.
        """
        if not any(self.directory.glob("*.safetensors")):
            return [], False
        held = {info.name for info in plan.tensors}
        with CheckpointReader(self.directory) as reader:
            stored = {**reader.tensors, **reader.others}
            return [info for name, info in stored.items() if name not in held], reader.quantized

    def _carry_over(self, writer: Writer, carried: Sequence[TensorInfo]) -> None:
        if not carried:
            return
        with CheckpointReader(self.directory) as reader:
            for info in carried:
                for box in boxes(region_of(info.shape), CHUNK_BYTES // info.dtype.itemsize):
                    writer.write(info.name, box, reader.read(info.name, box))

    def _differing_copies(
        self, reader: Reader, parameters: Mapping[str, torch.Tensor], pieces: Iterable[Piece]
    ) -> list[str]:
        """Tensors that should repeat a piece of this rank's, and do not."""
        repeats: dict[str, list[str]] = {}
        for name, original in self.family.copies_in(self.spec, reader.tensors).items():
            repeats.setdefault(original, []).append(name)
        differ: list[str] = []
        for piece in pieces:
            for name in repeats.get(piece.tensor, ()):
                held = piece.get(parameters[piece.parameter])
                for box in boxes(piece.region, CHUNK_BYTES // held.itemsize):
                    part = held[slices(relative(box, piece.region))].contiguous()
                    copy = reader.read(name, box).to(part)
                    # As bytes: two that are both NaN are the same.
                    if not torch.equal(part.view(torch.uint8), copy.view(torch.uint8)):
                        differ.append(f"{name} differs from {piece.tensor}")
                        break
        return differ


def chunks_of(model: Model) -> Sequence[torch.nn.Module]:
    """The modules of a model."""
    return [model] if isinstance(model, torch.nn.Module) else model


def _zero_padding(parameters: Mapping[str, torch.Tensor], pieces: Sequence[Piece]) -> None:
    """What pads the vocabulary is in no file."""
    for name in (EMBEDDING, OUTPUT_LAYER):
        if name in parameters:
            held = [piece.local_region[0][1] for piece in pieces if piece.parameter == name]
            parameters[name].detach()[max(held, default=0) :].zero_()
