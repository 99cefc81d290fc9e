"""Where a model comes from: a Hugging Face directory, a Megatron torch_dist checkpoint, or both."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actors.checkpoint_files import (
    SourceTensor,
    checkpoint_root,
    find_iteration,
    read_source_index,
    write_source_index,
)
from bridge.checkpoint import CheckpointReader, resolve_model
from bridge.plan import TensorInfo, main_dtype
from bridge.safetensors_file import DTYPE_NAMES, DTYPES
from bridge.side_files import LATEST, METADATA, adapt_config, copy_side_files
from configs.errors import ConfigError

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What the files of a source say of its tensors."""

    tensors: Mapping[str, TensorInfo] | None
    """Names, types and shapes as they are in safetensors, or were before the torch_dist checkpoint was made.

    None when nothing says so; they then follow from the model.
    """
    quantized: bool
    """Whether some of them are stored in another type than they are loaded in."""


def find_model(model: str | None, mcore_model: Path | None, option: str) -> ModelSource:
    """The source of what a user gave as `option` and as that with `mcore_` before its last part.

    Raises ConfigError naming the option, and the other one where a directory is of the other kind.
    """
    section, dot, name = option.rpartition(".")
    mcore_option = f"{section}{dot}mcore_{name}"
    if mcore_model is None:
        assert model is not None, "the configuration makes sure of one of the two"
        if is_torch_dist(Path(model)):
            raise ConfigError(
                f"{option}: {model} is a Megatron torch_dist checkpoint; give it as --{mcore_option}"
            )
        return ModelSource(directory=resolve_model(model, option).resolve())
    mcore = mcore_model.resolve()
    try:
        find_iteration(mcore)
    except ConfigError as error:
        hint = f"; its weights are safetensors: give it as --{option}" if _has_safetensors(mcore) else ""
        raise ConfigError(f"{mcore_option}: {error}{hint}") from error
    root = checkpoint_root(mcore)
    if model is None and not (root / "config.json").is_file():
        raise ConfigError(
            f"{mcore_option}: {root} has no config.json; give the directory that has it, and the tokenizer, as "
            f"--{option}"
        )
    directory = root if model is None else resolve_model(model, option)
    return ModelSource(directory=directory.resolve(), mcore=mcore)


def _has_safetensors(directory: Path) -> bool:
    return any(directory.glob("*.safetensors"))


def is_torch_dist(directory: Path) -> bool:
    """Whether the weights in it are Megatron's."""
    found = any((directory / name).is_file() for name in (LATEST, METADATA))
    return found and not _has_safetensors(directory)


def load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a model directory. Raises ConfigError naming it when none can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    # The files are foreign, and so is what reads them: a broken one may raise anything.
    except Exception as error:
        raise ConfigError(f"{directory}: no tokenizer can be loaded: {error!r}") from error


def read_contents(source: ModelSource) -> Contents:
    """What the source holds. Raises CheckpointError or ConfigError naming the file."""
    # Without a torch_dist checkpoint there should be weights here; the reader says what is missing.
    if source.mcore is None or _has_safetensors(source.directory):
        with CheckpointReader(source.directory) as reader:
            return Contents(tensors=dict(reader.tensors), quantized=source.mcore is None and reader.quantized)
    index = read_source_index(checkpoint_root(source.mcore))
    if index is None:
        return Contents(tensors=None, quantized=False)
    infos = [TensorInfo(name=each.name, dtype=DTYPES[each.dtype], shape=each.shape) for each in index]
    return Contents(tensors={info.name: info for info in infos}, quantized=False)


def tensors_of(source: ModelSource) -> Mapping[str, TensorInfo] | None:
    """The tensors that read_contents tells."""
    return read_contents(source).tensors


def model_size(source: ModelSource, tensors: Mapping[str, TensorInfo] | None) -> ModelSize:
    """What the `tensors` of a source amount to; estimated from the files of its torch_dist where it has none."""
    if tensors is None:
        assert source.mcore is not None, "a source without tensors is a torch_dist checkpoint"
        nbytes = sum(path.stat().st_size for path in find_iteration(source.mcore).glob("*.distcp"))
        # Two bytes each, if nothing but weights is in there.
        return ModelSize(num_parameters=nbytes // 2, num_in_experts=0, nbytes=nbytes)
    counts = {name: math.prod(info.shape) for name, info in tensors.items()}
    return ModelSize(
        num_parameters=sum(counts.values()),
        # Experts that every token passes are called shared_experts, and are split like other layers.
        num_in_experts=sum(count for name, count in counts.items() if ".experts." in name),
        nbytes=sum(info.nbytes for info in tensors.values()),
    )


def write_beside(
    directory: Path, bridge: "ModelBridge", *, torch_dtype: torch.dtype | None, mtp: bool
) -> None:
    """Put what a torch_dist checkpoint lacks of a model beside it: config, tokenizer, and the list of tensors.

    These are of `torch_dtype`, or else of the types that they have in the source. Without `mtp` the checkpoint,
    and so the list, has no layers for multi-token prediction.
    """
    copy_side_files(bridge.directory, directory)
    infos = [
        info
        for name, info in (bridge.tensors_in(torch_dtype) or {}).items()
        if mtp or not bridge.family.is_extra_layer(bridge.spec, name)
    ]
    # No tensor of the checkpoint is quantized.
    adapt_config(directory / "config.json", main_dtype(infos) if infos else torch_dtype, quantized=False)
    if infos:
        write_source_index(
            directory,
            [SourceTensor(name=info.name, dtype=DTYPE_NAMES[info.dtype], shape=info.shape) for info in infos],
        )
