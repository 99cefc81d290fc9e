"""A seccomp filter: system calls that a program has no use for fail with EPERM.

It leaves no sockets (pairs of connected ones aside), no new namespaces, no mounts, no look into other
processes, and none of the calls that kernel exploits mostly start from. Linux 3.17, x86_64 and aarch64.
"""

import ctypes
import errno
import os
import struct

from algorithms.rewards.isolation.kernel import PR_SET_SECCOMP, prctl

_FILTER = 2
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# Offsets in struct seccomp_data: the call's number, the architecture, the first argument's low half.
_NUMBER, _ARCHITECTURE, _FIRST = 0, 4, 16
# On x86_64 numbers from here on are the x32 ABI's.
_X32 = 0x40000000
_NEW_NAMESPACES = 0x7E020000

_CLONE3 = 435
_SAME_EVERYWHERE = (
    *(425, 426, 427),  # io_uring, which opens sockets without socket()
    *(428, 429, 430, 431, 432, 433, 442),  # open_tree to fspick, mount_setattr
    *(438, 440, 448),  # pidfd_getfd, process_madvise, process_mrelease
)
_X86_64 = (
    41,  # socket
    *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
    *(155, 161, 165, 166, 272, 308),  # pivot_root, chroot, mount, umount2, unshare, setns
    *(248, 249, 250, 298, 321, 323),  # add_key, request_key, keyctl, perf_event_open, bpf, userfaultfd
    *(163, 167, 168, 169, 172, 173, 179),  # acct, swapon, swapoff, reboot, iopl, ioperm, quotactl
    *(175, 176, 246, 313, 320, 154),  # modules, kexec, modify_ldt
    *(103, 135, 303, 304),  # syslog, personality, name_to_handle_at, open_by_handle_at
)
_AARCH64 = (
    198,  # socket
    *(117, 270, 271, 272),  # ptrace, process_vm_readv, process_vm_writev, kcmp
    *(41, 51, 40, 39, 97, 268),  # pivot_root, chroot, mount, umount2, unshare, setns
    *(217, 218, 219, 241, 280, 282),  # add_key, request_key, keyctl, perf_event_open, bpf, userfaultfd
    *(89, 224, 225, 142, 60),  # acct, swapon, swapoff, reboot, quotactl
    *(105, 106, 273, 104, 294),  # modules, kexec
    *(116, 92, 264, 265),  # syslog, personality, name_to_handle_at, open_by_handle_at
)
# Machine: audit architecture, clone, what is refused.
_MACHINES = {
    "x86_64": (0xC000003E, 56, (*_X86_64, *_SAME_EVERYWHERE)),
    "aarch64": (0xC00000B7, 220, (*_AARCH64, *_SAME_EVERYWHERE)),
}
# Changes of modes, owners, times and extended attributes by path, which Landlock lets pass.
_ATTRIBUTES = {
    "x86_64": (90, 268, 92, 94, 260, 132, 235, 261, 280, 188, 189, 197, 198, 452, 463, 466),
    "aarch64": (53, 54, 88, 5, 6, 14, 15, 452, 463, 466),
}


def refuse_calls(*, also_attributes: bool = False) -> None:
    """Put the filter on this process and all that it starts. Needs no_new_privs. Raises OSError.

    With `also_attributes` nobody's files change mode, owner, times or extended attributes by path.
    """
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(errno.ENOSYS, f"seccomp: no list of system calls for {machine}")
    architecture, clone, refused = _MACHINES[machine]
    if also_attributes:
        refused = (*refused, *_ATTRIBUTES[machine])
    program = b"".join(_program(architecture, clone, refused))
    # struct sock_fprog: a length, and after padding a pointer.
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    prctl(PR_SET_SECCOMP, _FILTER, ctypes.addressof(header))


def _program(architecture: int, clone: int, refused: tuple[int, ...]) -> list[bytes]:
    """Instructions; each jump says how many it skips if true, and if false."""
    denied = _instruction(_RETURN, _ERRNO | errno.EPERM)
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _X32, 0, 1),
        denied,
    ]
    for number in refused:
        program += [_instruction(_EQUAL, number, 0, 1), denied]
    return [
        *program,
        # Its flags lie in memory, out of a filter's sight; without it libc takes clone.
        _instruction(_EQUAL, _CLONE3, 0, 1),
        _instruction(_RETURN, _ERRNO | errno.ENOSYS),
        _instruction(_EQUAL, clone, 0, 3),
        _instruction(_LOAD, _FIRST),
        _instruction(_ANY_BIT, _NEW_NAMESPACES, 0, 1),
        denied,
        _instruction(_RETURN, _ALLOW),
    ]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
