"""System calls that Python 3.11 has no function for. Each raises OSError; Linux only."""

import ctypes
import os

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_SECUREBITS = 1, 4, 22, 28
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
SECBIT_NOROOT_AND_LOCKED = 0b11

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def prctl(option: int, *values: int) -> None:
    """prctl(2)."""
    # Variadic in C: each argument has to be as wide as the kernel reads it.
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _check(_libc().prctl(ctypes.c_int(option), *padded), "prctl")


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc().unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    result = _libc().mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    _check(result, f"mount on {target}")


def enter_root(path: str) -> None:
    """Make the mount point `path` the root of this process and detach the old one."""
    os.chdir(path)
    syscall(_PIVOT_ROOT[os.uname().machine], b".", b".", what="pivot_root")
    # Both are mounted on "." now; the old one lies on top.
    _check(_libc().umount2(b".", ctypes.c_int(MNT_DETACH)), "umount")
    os.chdir("/")


def syscall(number: int, *values: "int | bytes | ctypes.Array[ctypes.c_char] | None", what: str) -> int:
    """syscall(2): integers as unsigned long, bytes as pointers."""
    given = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in values]
    result: int = _libc().syscall(ctypes.c_long(number), *given)
    return _check(result, what)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
