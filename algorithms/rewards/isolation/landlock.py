"""Landlock: the kernel refuses every file outside of what is listed, for this process and its children.

See Documentation/userspace-api/landlock.rst of Linux. Rights that a kernel does not know are left out, so
that an old one (ABI 1, Linux 5.13) protects files and a new one also TCP, abstract sockets and signals.
"""

import os
import stat
import struct

from algorithms.rewards.isolation.kernel import syscall

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
# All rights on files that an ABI knows; later ones only add.
_RIGHTS = ((5, (1 << 16) - 1), (3, (1 << 15) - 1), (2, (1 << 14) - 1), (1, (1 << 13) - 1))
_BIND_AND_CONNECT_TCP = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


def landlock_abi() -> int:
    """Version of the kernel's Landlock. Raises OSError where it has none or is turned off."""
    return syscall(_CREATE_RULESET, None, 0, _VERSION, what="landlock")


def restrict(*, readable: list[str], writable: list[str]) -> int:
    """Leave this process only these paths and what is below; gives the ABI. Needs no_new_privs.

    Paths that do not exist are left out. Raises OSError.
    """
    abi = landlock_abi()
    rights = next(rights for least, rights in _RIGHTS if abi >= least)
    fields = [rights]
    if abi >= 4:
        fields.append(_BIND_AND_CONNECT_TCP)
    if abi >= 6:
        fields.append(_ABSTRACT_SOCKETS_AND_SIGNALS)
    attribute = struct.pack(f"<{len(fields)}Q", *fields)
    ruleset = syscall(_CREATE_RULESET, attribute, len(attribute), 0, what="landlock_create_ruleset")
    try:
        for path in readable:
            _allow(ruleset, path, _EXECUTE | _READ_FILE | _READ_DIR)
        for path in writable:
            _allow(ruleset, path, rights)
        syscall(_RESTRICT_SELF, ruleset, 0, what="landlock_restrict_self")
    finally:
        os.close(ruleset)
    return abi


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _OF_FILES
        rule = struct.pack("<Qi", rights, place)
        syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0, what=f"landlock_add_rule {path}")
    finally:
        os.close(place)
