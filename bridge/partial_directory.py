"""A directory that appears whole: written under another name beside its place, renamed when it is complete."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from bridge.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from bridge.checkpoint import INDEX
from bridge.side_files import LATEST, METADATA, SOURCE_INDEX
from configs.errors import ConfigError, naming

NOTES = ".bascule-"
"""Names that begin with this, directly in a partial directory, are notes about it and go when it is complete."""
_PARTIAL = ".bascule-partial"
_ITERATION = re.compile(rf"(iter_\d+|release)({re.escape(_PARTIAL)})?")


def partial_of(final: Path) -> Path:
    """Where `final` is written. Nobody else gives such a name: what an interrupted save left there is removed."""
    return final.with_name(final.name + _PARTIAL)


def check_writable(directory: Path) -> None:
    """Raises ConfigError when `directory` cannot be made, as far as permissions tell. Makes nothing."""
    parent = directory.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise ConfigError(f"{directory} cannot be made: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{directory} cannot be made: no permission to write in {parent}")


def check_replaceable(directory: Path) -> None:
    """Raises ConfigError unless there is nothing at `directory`, or what a save may replace.

    That is an empty directory, or a checkpoint: config.json or a PEFT adapter's config with safetensors, or what
    Megatron writes. With
    other directories in it than Megatron's iterations it is more than a checkpoint, and not replaced.
    """
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; choose another")
    if directory.is_mount():
        raise ConfigError(f"{directory} is a mount point, which no rename replaces; choose a directory in it")
    entries = sorted(directory.iterdir())
    if not entries:
        return
    if not _is_checkpoint({path.name for path in entries}):
        raise ConfigError(
            f"{directory} is neither empty nor a checkpoint, so it is never replaced; choose another"
        )
    more = [path.name for path in entries if path.is_dir() and not _ITERATION.fullmatch(path.name)]
    if more:
        raise ConfigError(
            f"{directory} is never replaced, since it is more than a checkpoint: it also holds {', '.join(more)}"
        )


def make_partial(final: Path) -> None:
    """Make `partial_of(final)`, empty. Raises WriteError, or ConfigError when `final` may not be replaced."""
    check_replaceable(final)
    partial = partial_of(final)
    with naming(partial):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)


def put_in_place(final: Path) -> None:
    """Give `partial_of(final)` its name, once all of it is on disk, and remove what had the name before.

    One of the two is whole at any time. Raises WriteError, or ConfigError when what has the name may not be
    replaced; it then keeps the name.
    """
    check_replaceable(final)
    with naming(final):
        _replace(final, partial_of(final))


def _replace(final: Path, partial: Path) -> None:
    for note in partial.glob(f"{NOTES}*"):
        note.unlink()
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    if not final.exists():
        partial.rename(final)
        _sync(final.parent)
        return
    # A new name, so that only what is moved here is removed.
    aside = Path(tempfile.mkdtemp(prefix=f"{final.name}.bascule-old-", dir=final.parent))
    final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        aside.rename(final)
        raise
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _is_checkpoint(names: set[str]) -> bool:
    weights = INDEX in names or any(name.endswith(".safetensors") for name in names)
    iteration = METADATA in names and any(name.endswith(".distcp") for name in names)
    adapter = ADAPTER_CONFIG in names and ADAPTER_WEIGHTS in names
    return (
        ("config.json" in names and weights) or adapter or iteration or bool(names & {LATEST, SOURCE_INDEX})
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
