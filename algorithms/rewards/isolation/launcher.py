"""Starts one program behind as many walls as the kernel allows, and ends everything that came of it.

Four processes: the launcher waits and cleans up; its child makes the namespaces; that one's child is the
first process in them and builds the file system; its child becomes the program. Nothing here imports what
takes long to import: a program is waiting for each of these starts.
"""

import marshal
import os
import select
import sys
import time

from algorithms.rewards.isolation import kernel
from algorithms.rewards.isolation.identity import count_tasks, kill_children, kill_user, write_maps
from algorithms.rewards.isolation.kernel import prctl
from algorithms.rewards.isolation.program import Task, note, run_program
from algorithms.rewards.isolation.root import build_root

_SIGKILL = 9
_APART = kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET
# Best first: root of a machine without user namespaces can still have the others.
_NAMESPACES = (kernel.CLONE_NEWUSER | _APART, _APART, 0)
_NAMES = {
    kernel.CLONE_NEWUSER: "user namespace",
    kernel.CLONE_NEWNS: "mount namespace",
    kernel.CLONE_NEWPID: "pid namespace",
    kernel.CLONE_NEWNET: "network namespace",
}
_CLEAN_UP_S = 5.0


def main() -> None:
    """Run the task in sys.argv[1] (hex of a marshalled Task's fields) and write a report to its descriptor.

    The report is a marshalled dict: `notes` (see `note`), `end` (exit, time or stopped), `left` (whether
    processes may have been left).
    """
    task = Task(**marshal.loads(bytes.fromhex(sys.argv[1])))
    os.set_inheritable(task.control, False)
    os.set_inheritable(task.report, False)
    prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    reading, task.channel = os.pipe()
    notes: list[tuple[str, str]] = []
    first, lifeline = _start(task, notes)
    # From here on nobody of the same user may look into this process or trace it.
    prctl(kernel.PR_SET_DUMPABLE, 0)
    os.close(task.channel)
    end = _wait(task, reading, notes)
    left = not _end_all(first, notes)
    os.close(lifeline)
    if end == "stopped":
        # The process that made the folder may be gone.
        _remove(os.path.dirname(task.place))
    os.write(task.report, marshal.dumps({"notes": notes, "end": end, "left": left}))


def _remove(folder: str) -> None:
    try:
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                _remove(entry.path)
            else:
                os.unlink(entry.path)
        os.rmdir(folder)
    except OSError:
        # Its maker removes it, or it was made so that this user cannot.
        pass


def _start(task: Task, notes: list[tuple[str, str]]) -> tuple[int, int]:
    """The child's process id, and a pipe whose closing it notices."""
    for flags in _NAMESPACES:
        ready, tell_ready = os.pipe()
        go, tell_go = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ready)
            os.close(tell_go)
            _make_namespaces(task, flags, tell_ready, go)
        os.close(tell_ready)
        os.close(go)
        # What a child that failed has to say is in the channel.
        failure = None if os.read(ready, 1) else ""
        os.close(ready)
        if failure is None and flags & kernel.CLONE_NEWUSER:
            failure = write_maps(child)
        if failure is None:
            os.write(tell_go, b"!")
            return child, tell_go
        if failure:
            notes.append(("failed", failure))
        os.close(tell_go)
        os.kill(child, _SIGKILL)
        os.waitpid(child, 0)
    raise AssertionError("the last try needs nothing of the kernel")


def _make_namespaces(task: Task, flags: int, tell_ready: int, go: int) -> None:
    """In the launcher's child. Does not return."""
    try:
        if flags:
            kernel.unshare(flags)
    except OSError as error:
        note(task, "failed", f"{'user ' if flags & kernel.CLONE_NEWUSER else ''}namespaces: {error}")
        os._exit(1)
    # After unshare, which takes it back.
    prctl(kernel.PR_SET_PDEATHSIG, _SIGKILL)
    os.write(tell_ready, b"!")
    if not os.read(go, 1):
        os._exit(1)
    task.others = count_tasks(os.getuid()) if _shares_count(flags) else 0
    os.close(tell_ready)
    first = os.fork()
    if first == 0:
        _be_first(task, flags, go)
    prctl(kernel.PR_SET_DUMPABLE, 0)
    os.waitpid(first, 0)
    os._exit(0)


def _shares_count(flags: int) -> bool:
    """Whether RLIMIT_NPROC counts all that the user runs; since Linux 5.14 a user namespace has its own."""
    release = os.uname().release.split(".")
    new = (int(release[0]), int(release[1])) >= (5, 14)
    return os.getuid() != 0 and not (flags & kernel.CLONE_NEWUSER and new)


def _be_first(task: Task, flags: int, go: int) -> None:
    """In the first process of the namespaces. Does not return."""
    prctl(kernel.PR_SET_PDEATHSIG, _SIGKILL)
    if select.select([go], [], [], 0)[0]:
        # The launcher was gone before the line above.
        os._exit(1)
    _prefer_to_be_killed()
    mechanisms = [name for flag, name in _NAMES.items() if flags & flag and flag != kernel.CLONE_NEWNS]
    own_proc = False
    if flags & kernel.CLONE_NEWNS:
        try:
            own_proc = build_root(task.place, files=task.files, readable=task.readable, size=task.disk)
            mechanisms.append(_NAMES[kernel.CLONE_NEWNS])
        except OSError as error:
            note(task, "failed", f"mounts: {error}")
    program = os.fork()
    if program == 0:
        run_program(task, mechanisms, flags, own_proc=own_proc)
    prctl(kernel.PR_SET_DUMPABLE, 0)
    while True:
        ended, status, usage = os.wait4(-1, 0)
        if ended == program:
            break
    note(task, "cpu", str(usage.ru_utime + usage.ru_stime))
    note(task, "exit", str(os.waitstatus_to_exitcode(status)))
    # As the first process in its namespace it takes all others along.
    os._exit(0)


def _prefer_to_be_killed() -> None:
    """When the machine runs out of memory, this goes before the worker."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass


def _wait(task: Task, channel: int, notes: list[tuple[str, str]]) -> str:
    """Collect notes until the program has ended, its time is up, or the other end lets go of `control`."""
    deadline = time.monotonic() + task.seconds
    text = b""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    poll.register(task.control, select.POLLIN)
    end = "exit"
    while True:
        left_s = deadline - time.monotonic()
        ready = [descriptor for descriptor, _ in poll.poll(max(0.0, left_s) * 1000)]
        if task.control in ready:
            end = "stopped"
            break
        if not ready:
            end = "time"
            break
        more = os.read(channel, 65536)
        text += more
        if not more or b"exit\t" in text:
            break
    for line in text.decode(errors="replace").splitlines():
        key, _, value = line.partition("\t")
        notes.append((key, value))
    return end


def _end_all(first: int, notes: list[tuple[str, str]]) -> bool:
    """Kill what is below this process until nothing is left; False if that took too long."""
    os.kill(first, _SIGKILL)
    deadline = time.monotonic() + _CLEAN_UP_S
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        # The first process of a pid namespace takes all of it along, and goes with its parent.
        if ("has", "pid namespace") not in notes:
            for key, value in notes:
                if key == "user":
                    kill_user(int(value))
            kill_children(os.getpid())
        time.sleep(0.001)
    return False
