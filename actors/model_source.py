"""Where a model comes from: a Hugging Face directory, a Megatron torch_dist checkpoint, or both."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.checkpoint_files import (
    SourceTensor,
    checkpoint_root,
    copy_side_files,
    drop_quantization,
    find_iteration,
    read_source_index,
    write_source_index,
)
from bridge.checkpoint import CheckpointReader, resolve_model
from bridge.plan import TensorInfo
from bridge.safetensors_file import DTYPES

if TYPE_CHECKING:
    from bridge.model_bridge import ModelBridge


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """`directory` has config and tokenizer, and the weights unless they are in the checkpoint `mcore`."""

    directory: Path
    mcore: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """How much a model is: what estimates of memory start from."""

    num_parameters: int
    """Elements of all tensors."""
    num_in_experts: int
    """How many of them are in experts that a router chooses from; 0 where nothing says so."""
    nbytes: int
    """Size of all tensors in the types that they are stored in."""
    largest: int
    """Elements of the largest tensor; 0 where nothing says so."""


def find_model(model: str | None, mcore_model: Path | None, option: str) -> ModelSource:
    """The source of what a user gave. Raises ConfigError naming the `option`."""
    mcore = None if mcore_model is None else mcore_model.resolve()
    directory = model if model is not None or mcore is None else str(checkpoint_root(mcore))
    assert directory is not None, "the configuration makes sure of one of the two"
    return ModelSource(directory=resolve_model(directory, option=option).resolve(), mcore=mcore)


def tensors_of(source: ModelSource) -> Mapping[str, TensorInfo] | None:
    """Names, types and shapes as they are in safetensors, or were before the torch_dist checkpoint was made.

    None when nothing says so; they then follow from the model. Raises CheckpointError or ConfigError naming
    the file.
    """
    if any(source.directory.glob("*.safetensors")):
        with CheckpointReader(source.directory) as reader:
            return dict(reader.tensors)
    index = None if source.mcore is None else read_source_index(checkpoint_root(source.mcore))
    if index is None and source.mcore is None:
        # There should have been weights here; the reader says what is missing.
        with CheckpointReader(source.directory) as reader:
            return dict(reader.tensors)
    if index is None:
        return None
    return {
        tensor.name: TensorInfo(name=tensor.name, dtype=DTYPES[tensor.dtype], shape=tensor.shape)
        for tensor in index
    }


def model_size(source: ModelSource) -> ModelSize:
    """What the tensors amount to; where only a torch_dist checkpoint tells, estimated from its files.

    Raises like tensors_of.
    """
    tensors = tensors_of(source)
    if tensors is None:
        assert source.mcore is not None, "a source without tensors is a torch_dist checkpoint"
        nbytes = sum(path.stat().st_size for path in find_iteration(source.mcore).glob("*.distcp"))
        # Two bytes each, if nothing but weights is in there.
        return ModelSize(num_parameters=nbytes // 2, num_in_experts=0, nbytes=nbytes, largest=0)
    counts = {name: math.prod(info.shape) for name, info in tensors.items()}
    return ModelSize(
        num_parameters=sum(counts.values()),
        # Experts that every token passes are called shared_experts, and are split like other layers.
        num_in_experts=sum(count for name, count in counts.items() if ".experts." in name),
        nbytes=sum(info.nbytes for info in tensors.values()),
        largest=max(counts.values()),
    )


def write_beside(directory: Path, bridge: "ModelBridge", *, mtp: bool) -> None:
    """Put what a torch_dist checkpoint lacks of a model beside it: config, tokenizer, and the list of tensors.

    Without `mtp` the checkpoint, and so the list, has no layers for multi-token prediction.
    """
    copy_side_files(bridge.directory, directory)
    # No tensor of the checkpoint is quantized.
    drop_quantization(directory / "config.json")
    if bridge.tensors is None:
        return
    names = {dtype: name for name, dtype in DTYPES.items()}
    write_source_index(
        directory,
        [
            SourceTensor(name=name, dtype=names[info.dtype], shape=info.shape)
            for name, info in bridge.tensors.items()
            if mtp or not bridge.family.is_extra_layer(bridge.spec, name)
        ],
    )
