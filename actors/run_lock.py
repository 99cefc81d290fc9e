"""Two runs in one directory would write over each other: a run holds a lock on it for as long as it lives."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from configs.errors import ConfigError

LOCK = "run.lock"
# What file systems say that know no locks: Lustre mounted without flock, some FUSE ones, NFS without lockd.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a directory, or held it last."""

    host: str
    pid: int
    started: str
    """UTC, ISO 8601."""
    address: str | None = None
    """Of the Ray that the run uses, for `bascule status`."""
    job: str | None = None
    """Ray's number of the run."""
    wants_token: bool = False
    """Whether that Ray answers only those who show its token."""

    def describe(self) -> str:
        """For a message."""
        return f"process {self.pid} on {self.host}, started {self.started}"


class RunLock:
    """A lock that is held. The kernel lets it go when the process ends, however that comes."""

    def __init__(self, descriptor: int, holder: Holder) -> None:
        self._descriptor, self._holder = descriptor, holder

    def tell_address(self, address: str, job: str, *, wants_token: bool) -> None:
        """Write down by which address the run's Ray is found, what it calls the run, and whom it answers."""
        found = replace(self._holder, address=address, job=job, wants_token=wants_token)
        _write(self._descriptor, found)


@contextmanager
def hold(directory: Path) -> Generator[RunLock]:
    """Keep others out of the run directory, which is made if need be, while the body runs.

    The lock is flock's: on a local disk among all processes of the machine; on NFS the kernel takes it at the
    server, so among all hosts, unless the mount says `nolock` or `local_lock`; on Lustre among all hosts when
    mounted with `flock`. Where the file system knows no locks, a process of this host that lives keeps others
    out, and one of another host cannot be told from a dead one, so that it is named and the start refused.
    Raises ConfigError naming who holds it, and when nothing can be written there.
    """
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"output_dir: {directory} cannot be written: {error}") from error
    try:
        knows_locks = _take(path, descriptor)
        holder = Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        _write(descriptor, holder)
        try:
            yield RunLock(descriptor, holder)
        finally:
            # The file stays: who opened it before and locks it after would hold one without a name.
            if not knows_locks:
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def read_holder(directory: Path) -> tuple[Holder, bool] | None:
    """Who holds the directory or did last, and whether it still does; None where no run has been.

    Asked from a host whose file system shares no locks with the holder's, it says that nobody does.
    """
    path = directory / LOCK
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        holder = _read(path)
        return None if holder is None else (holder, _is_held(descriptor, holder))
    finally:
        os.close(descriptor)


def _is_held(descriptor: int, holder: Holder) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return holder.host == socket.gethostname() and _lives(holder.pid)
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def _take(path: Path, descriptor: int) -> bool:
    """Whether the file system knows locks. Raises ConfigError when another run has it, or may have."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"output_dir: {path.parent} is in use by {_who(path)}; wait for it, end it, or choose another"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ConfigError(f"output_dir: {path} cannot be locked: {error}") from error
        holder = _read(path)
        if holder is not None and (holder.host != socket.gethostname() or _lives(holder.pid)):
            raise ConfigError(
                f"output_dir: {path.parent} may be in use by {holder.describe()}, and its file system knows no "
                f"locks ({error}); if that run is gone, remove {path}"
            ) from None
        return False
    return True


def _who(path: Path) -> str:
    # It may not have written its name yet.
    holder = _read(path)
    return "another run" if holder is None else holder.describe()


def _lives(pid: int) -> bool:
    return pid != os.getpid() and Path(f"/proc/{pid}").exists()


def _read(path: Path) -> Holder | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return Holder(**content)
    except (OSError, ValueError, TypeError):
        return None


def _write(descriptor: int, holder: Holder) -> None:
    data = (json.dumps(asdict(holder)) + "\n").encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)
