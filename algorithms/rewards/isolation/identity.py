"""Users and processes: who a program runs as, how many there are, and which are below a process."""

import os
import resource

# Inside of a user namespace. Not 0: the program is to have no capabilities.
INSIDE = 1000
_SIGKILL = 9


def candidates(launcher: int) -> tuple[int, int]:
    """Ids that nobody else has: one far out, and one within what containers map, where systemd's are dynamic."""
    return 1_879_048_192 + launcher, 61_184 + launcher % 4_000


def write_maps(child: int) -> str | None:
    """Give `child`, which is in a new user namespace, its users. None, or what the kernel said."""
    failure = None
    user, group = os.getuid(), os.getgid()
    if user == 0:
        # A user of its own for the program: limits of processes do not bind root's.
        maps = [f"0 0 1\n{INSIDE} {other} 1" for other in candidates(os.getpid())]
        pairs = [(each, each) for each in maps]
    else:
        pairs = [(f"{INSIDE} {user} 1", f"{INSIDE} {group} 1")]
    for users, groups in pairs:
        try:
            _write(f"/proc/{child}/uid_map", users)
            if user != 0:
                _write(f"/proc/{child}/setgroups", "deny")
            _write(f"/proc/{child}/gid_map", groups)
            return None
        except OSError as error:
            failure = f"user namespaces: {error.filename}: {error.strerror}"
    return failure


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(descriptor)


def become(user: int) -> None:
    """Give up root for `user` and the group of the same number. Raises OSError."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def count_tasks(user: int) -> int:
    """Threads of `user` on this machine, as far as /proc shows them."""
    total = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{process}").st_uid == user:
                total += len(os.listdir(f"/proc/{process}/task"))
        except OSError:
            continue
    return total


def kill_children(parent: int) -> None:
    """Kill the children of `parent`, once; a child that is killed leaves its own to a subreaper.

    A process that starts others all the time gets a limit first, so that repeating this comes to an end.
    """
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/stat") as file:
                # The name in brackets may have spaces and brackets in it.
                fields = file.read().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                resource.prlimit(int(process), resource.RLIMIT_NPROC, (0, 0))
                os.kill(int(process), _SIGKILL)
        except OSError:
            continue


def kill_user(user: int) -> None:
    """Kill every process of `user` at once, whichever it is that it starts meanwhile. Needs root."""
    child = os.fork()
    if child == 0:
        try:
            become(user)
            # Spares the one who asks.
            os.kill(-1, _SIGKILL)
        except OSError:
            pass
        finally:
            os._exit(0)
    os.waitpid(child, 0)
