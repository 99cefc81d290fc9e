"""What reading a torch_dist checkpoint may unpickle: descriptions of tensors and plain data, nothing that runs.

torch reads `.metadata`, and objects beside tensors in `.distcp` files, by unpickling without a restriction.
"""

import io
import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from configs.errors import ConfigError

_CHECKPOINT = "torch.distributed.checkpoint"
_KNOWN = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    f"{_CHECKPOINT}.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata", "ChunkStorageMetadata"),
    },
    f"{_CHECKPOINT}.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    # Where Python 3.13 has them.
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class UntrustedPickleError(ConfigError):
    """A file of a checkpoint asks for more than data when it is unpickled. Names the file and what it asks for."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        # A name is compared as a whole: one with dots would lead from what is known to anything.
        is_known = global_name in _KNOWN.get(module_name, ())
        is_type = module_name == "torch" and isinstance(vars(torch).get(global_name), torch.dtype)
        if not is_known and not is_type:
            name = f"{module_name}.{global_name}"
            raise UntrustedPickleError(
                f"{self._path}: asks for {name}, which a checkpoint has no need of and which "
                "may run code; it was not loaded. If you trust it, save it as safetensors with what wrote it"
            )
        return super().find_class(module_name, global_name)


def read_metadata(folder: Path) -> Metadata:
    """What a torch_dist checkpoint says it holds.

    Raises UntrustedPickleError for a file that would run code, and whatever unpickling raises for a damaged one.
    """
    path = folder / ".metadata"
    with path.open("rb") as file:
        metadata = _Unpickler(file, path).load()
    if not isinstance(metadata, Metadata):
        raise UntrustedPickleError(
            f"{path}: holds {type(metadata).__name__}, not the metadata of a checkpoint"
        )
    return metadata


@contextmanager
def data_only() -> Generator[None]:
    """While the body runs torch.load reads plain data alone, also where torch itself asks for anything."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        # Transformer Engine's extra state.
        with torch.serialization.safe_globals([io.BytesIO]):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
