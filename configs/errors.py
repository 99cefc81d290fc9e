"""The root of the errors a user is meant to read: one message that names what, where and what to do."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class BasculeError(Exception):
    """Takes a single message, so that it pickles across Ray. The command prints it without a traceback."""


class ConfigError(BasculeError, ValueError):
    """Something a user wrote, or gave to be read, is wrong: the command's exit code is 2, not 1."""


class WriteError(BasculeError):
    """Output cannot be written. Names the file, and the tensor where there is one."""


@contextmanager
def naming(path: Path, tensor: str | None = None) -> Generator[None]:
    """Turns errors of the operating system into WriteError that names the file and the tensor."""
    try:
        yield
    except OSError as error:
        what = f"{path}: {tensor}" if tensor else str(path)
        raise WriteError(f"{what}: cannot be written: {error}") from error
