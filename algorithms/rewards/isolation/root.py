"""A file system made for one program: system directories read-only, a folder in memory, nothing else."""

import os

from algorithms.rewards.isolation import kernel
from algorithms.rewards.isolation.kernel import mount

HOME = "/sandbox"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# Without it, multiprocessing has no locks.
SHARED_MEMORY = "/dev/shm"
# Empty ones take memory as well.
_MOST_FILES = 16_384
_STREAMS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
# statvfs flags that a mount of another owner keeps, and the same in mount(2).
_KEPT = ((4, 4), (8, 8), (1024, 1024), (2048, 2048), (4096, 1 << 21))


def build_root(place: str, *, files: str, readable: list[str], size: int) -> bool:
    """Mount the new root on the folder `place` and enter it; needs a mount namespace of its own.

    It has `readable` at the same paths, `files` copied to HOME, and room for `size` bytes. Whether it has a
    /proc of its own is what comes back: a container may not allow one. Raises OSError, the old root in place.
    """
    mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    mount(
        "tmpfs",
        place,
        "tmpfs",
        kernel.MS_NOSUID | kernel.MS_NODEV,
        f"size={size},nr_inodes={_MOST_FILES},mode=755",
    )
    for path in readable:
        _show(path, place)
    for device in DEVICES:
        _show(device, place)
    for name, target in _STREAMS.items():
        os.symlink(target, f"{place}/dev/{name}")
    os.mkdir(place + SHARED_MEMORY)
    os.chmod(place + SHARED_MEMORY, 0o1777)
    os.symlink(HOME, f"{place}/tmp")
    _copy(files, place + HOME)
    own_proc = _mount_proc(f"{place}/proc")
    kernel.enter_root(place)
    return own_proc


def _show(path: str, place: str) -> None:
    """`path` in the new root: a symbolic link as such, all else as a read-only mount."""
    target = place + path
    if os.path.lexists(target) or not os.path.exists(path):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(path, target, None, kernel.MS_BIND | kernel.MS_REC)
    flags = os.statvfs(target).f_flag
    kept = sum(flag for shown, flag in _KEPT if flags & shown)
    if path not in DEVICES:
        kept |= kernel.MS_RDONLY
    mount(None, target, None, kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_NOSUID | kept)


def _mount_proc(path: str) -> bool:
    os.mkdir(path)
    try:
        mount("proc", path, "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    except OSError:
        return False
    return True


def _copy(source: str, target: str) -> None:
    os.mkdir(target)
    for entry in os.scandir(source):
        path = f"{target}/{entry.name}"
        if entry.is_dir():
            _copy(entry.path, path)
            continue
        with open(entry.path, "rb") as read, open(path, "wb") as written:
            written.write(read.read())
        os.chmod(path, entry.stat().st_mode & 0o777)
