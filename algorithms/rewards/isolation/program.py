"""The last process before the program: limits, identity, Landlock, the filter of system calls, exec."""

import math
import os
import resource
import sys

from algorithms.rewards.isolation import kernel
from algorithms.rewards.isolation.identity import INSIDE, become, candidates
from algorithms.rewards.isolation.kernel import prctl
from algorithms.rewards.isolation.landlock import restrict
from algorithms.rewards.isolation.root import DEVICES, HOME, SHARED_MEMORY
from algorithms.rewards.isolation.seccomp import refuse_calls

PATH = "/usr/local/bin:/usr/bin:/bin"
# What each protection rests on: one of these is enough, in `processes` both are needed.
_FILES, _NETWORK, _CALLS = ("mount namespace", "landlock"), ("network namespace", "seccomp"), ("seccomp",)
_PROCESSES = ("pid namespace", "process limit")


class Task:
    """What to run and how, as the launcher gets it.

    Not a dataclass: importing those takes longer than starting Python. Sizes in bytes, times in seconds;
    `files` is the folder with the program's files, `place` an empty one for mounts, `control` and `report` are
    descriptors of the launcher, `channel` and the last two of its own making.
    """

    def __init__(
        self,
        *,
        command: list[str],
        files: str,
        place: str,
        readable: list[str],
        require: list[str],
        seconds: float,
        cpu_seconds: float,
        memory: int,
        file_size: int,
        disk: int,
        open_files: int,
        processes: int,
        control: int,
        report: int,
    ) -> None:
        self.command, self.files, self.place = command, files, place
        self.readable, self.require = readable, require
        self.seconds, self.cpu_seconds, self.memory = seconds, cpu_seconds, memory
        self.file_size, self.disk, self.open_files, self.processes = file_size, disk, open_files, processes
        self.control, self.report = control, report
        self.channel = -1
        self.launcher, self.user = os.getpid(), os.getuid()
        self.others = 0


def note(task: Task, key: str, value: str) -> None:
    """Tell the launcher: `has` a mechanism, `failed` with a reason, `lacks` a protection that is required,
    `error` before the program started, `user` of its own, `start`, `cpu` seconds, `exit` code (of a signal
    negative).
    """
    os.write(task.channel, f"{key}\t{' '.join(value.split())}\n".encode())


def protections(mechanisms: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Which of filesystem, network, processes, syscalls the mechanisms give."""
    have = {"landlock" if each.startswith("landlock") else each for each in mechanisms}
    given = {
        "filesystem": not have.isdisjoint(_FILES),
        "network": not have.isdisjoint(_NETWORK),
        "processes": have.issuperset(_PROCESSES),
        "syscalls": not have.isdisjoint(_CALLS),
    }
    return tuple(name for name, is_given in given.items() if is_given)


def run_program(task: Task, mechanisms: list[str], flags: int, *, own_proc: bool) -> None:
    """Become the program. Does not return."""
    mounted = "mount namespace" in mechanisms
    home = HOME if mounted else task.files
    try:
        os.setsid()
        os.chdir(home)
        if os.getuid() != 0 or _take_identity(task, flags, home, mounted):
            mechanisms.append("process limit")
        _set_limits(task)
        prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        _drop_capabilities()
        mechanisms += _restrict(task, home, mounted=mounted, own_proc=own_proc)
        for mechanism in mechanisms:
            note(task, "has", mechanism)
        lacking = [each for each in task.require if each not in protections(mechanisms)]
        if lacking:
            note(task, "lacks", " ".join(lacking))
            os._exit(0)
        note(task, "start", "")
        environment = {"PATH": PATH, "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"}
        os.execvpe(task.command[0], task.command, environment)
    except OSError as error:
        note(task, "error", f"{task.command[0]}: {error.strerror or error}")
        os._exit(127)


def _take_identity(task: Task, flags: int, home: str, mounted: bool) -> bool:
    """From root to a user that nobody else is; False where that is impossible and the program stays root."""
    if not mounted and not _open_to_all(task.command[0]):
        note(task, "failed", f"separate user: only root may start {task.command[0]}")
        return False
    for user in (INSIDE,) if flags & kernel.CLONE_NEWUSER else candidates(task.launcher):
        try:
            _own(home, user)
            # /dev/stdin opens the pipe once more.
            for stream in range(3):
                os.chown(stream, user, user)
            become(user)
            note(task, "user", str(user))
            return True
        except OSError as error:
            note(task, "failed", f"separate user: {error}")
    return False


def _own(path: str, user: int) -> None:
    os.chown(path, user, user)
    for entry in os.scandir(path):
        if entry.is_dir():
            _own(entry.path, user)
        else:
            os.chown(entry.path, user, user)


def _open_to_all(path: str) -> bool:
    while path not in ("", "/"):
        if not os.stat(path).st_mode & 0o001:
            return False
        path = os.path.dirname(path)
    return True


def _set_limits(task: Task) -> None:
    # Those before the program, when it is counted together with them.
    processes = task.processes + task.others + (2 if task.user != 0 else 0)
    cpu_seconds = math.ceil(task.cpu_seconds)
    for kind, wanted, ceiling in (
        (resource.RLIMIT_AS, task.memory, task.memory),
        # At the soft limit comes SIGXCPU, which says what it was; at the hard one SIGKILL.
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_FSIZE, task.file_size, task.file_size),
        (resource.RLIMIT_NOFILE, task.open_files, task.open_files),
        (resource.RLIMIT_NPROC, processes, processes),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        most = resource.getrlimit(kind)[1]
        bound = sys.maxsize if most == resource.RLIM_INFINITY else most
        resource.setrlimit(kind, (min(wanted, bound), min(ceiling, bound)))


def _drop_capabilities() -> None:
    """Whoever is still root in some sense is not after exec."""
    try:
        prctl(kernel.PR_SET_SECUREBITS, kernel.SECBIT_NOROOT_AND_LOCKED)
    except OSError:
        # No capability to do so, and so none to lose.
        pass


def _restrict(task: Task, home: str, *, mounted: bool, own_proc: bool) -> list[str]:
    done: list[str] = []
    try:
        readable = [*task.readable, *(["/proc"] if own_proc else [])]
        writable = [home, *DEVICES, *([SHARED_MEMORY] if mounted else [])]
        done.append(f"landlock {restrict(readable=readable, writable=writable)}")
    except OSError as error:
        note(task, "failed", str(error))
    try:
        refuse_calls(also_attributes=not mounted)
        done.append("seccomp")
    except OSError as error:
        note(task, "failed", str(error))
    return done
