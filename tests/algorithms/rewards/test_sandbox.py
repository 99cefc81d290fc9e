"""Programs that try to do what the sandbox is there to stop, on this kernel and with less than it has."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from algorithms.rewards.isolation.program import protections
from algorithms.rewards.sandbox import (
    PROTECTIONS,
    SandboxError,
    SandboxLimits,
    SandboxResult,
    run_sandboxed,
    sandbox_support,
)
from configs.errors import ConfigError

SECRET = "sk-a-secret-of-the-parent"
MARK = f"mark-{os.getpid()}-{time.monotonic_ns()}"

# Tries all of it and prints, for each, what it got; `places.json` says where things are.
ATTACKS = """
import ctypes, json, os, socket, time
places = json.load(open("places.json"))

def attempt(action):
    try:
        return repr(action())
    except OSError as error:
        return type(error).__name__

def environments():
    found = ""
    for process in [places["parent"], os.getppid(), *filter(str.isdigit, os.listdir("/proc"))]:
        try:
            found += open(f"/proc/{process}/environ").read()
        except OSError:
            continue
    return found

def write(path):
    with open(path, "w") as file:
        return file.write("x")

def connect():
    with socket.socket() as client:
        client.settimeout(2)
        return client.connect(("127.0.0.1", places["port"]))

def bind():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        return server.sendto(b"x", ("127.0.0.1", places["port"]))

def call(*values):
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.syscall(*map(ctypes.c_long, values)), ctypes.get_errno()

def forks():
    count = 0
    while count < 60:
        try:
            if os.fork() == 0:
                os.setsid()
                os.nice(1)
                time.sleep(600)
                os._exit(0)
        except OSError:
            return count
        count += 1
    return count

print(json.dumps({
    "environment": attempt(lambda: dict(os.environ)),
    "environments": attempt(environments),
    "readable file": attempt(lambda: open(places["readable"]).read()),
    "private file": attempt(lambda: open(places["private"]).read()),
    "write beside": attempt(lambda: write(places["target"])),
    "chmod": attempt(lambda: os.chmod(places["target"], 0o600)),
    "connect": attempt(connect),
    "datagram": attempt(bind),
    # 0 only asks whether one could.
    "signal": attempt(lambda: os.kill(places["parent"], 0)),
    "signal the one above": attempt(lambda: os.kill(os.getppid(), 0)),
    # unshare, clone and clone3 with a new user namespace, io_uring_setup, ptrace: of x86_64.
    "calls": [call(*each) for each in ((272, 1 << 28), (56, 1 << 28), (435, 0, 0), (425, 1, 0), (101, 0))],
    "open descriptors": [fd for fd in range(3, 64) if attempt(lambda: os.fstat(fd)) != "OSError"],
    "own files": attempt(lambda: (write("mine"), open("mine").read(), open("/dev/stdin").read())),
    "forks": attempt(forks),
}))
"""

# Runs the program on its standard input in the sandbox, after it has lost what the arguments say.
WITH_LESS = """
import json, os, sys
from algorithms.rewards.isolation import kernel
from algorithms.rewards.isolation.seccomp import refuse_calls
from algorithms.rewards.sandbox import run_sandboxed
if "nobody" in sys.argv:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    # As it is for a program that this user has started.
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
if "no-namespaces" in sys.argv:
    # What a container's own filter does.
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    refuse_calls()
program, places, mark = json.load(sys.stdin)
places["parent"] = os.getpid()
result = run_sandboxed(program, stdin="in", files={mark: "", "places.json": json.dumps(places)})
print(json.dumps([result.mechanisms, result.stdout, result.stderr]))
"""


def run(program: str, *, files: dict[str, str] | None = None, **given: Any) -> SandboxResult:
    return run_sandboxed(program, files={MARK: "", **(files or {})}, **given)


def programs_left() -> list[str]:
    """Processes in a folder with this file's mark: other tests may run sandboxes at the same time."""
    found: list[str] = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and Path(process, "cwd", MARK).exists():
                found.append(process.name)
    return found


def places(folder: Path, port: int) -> dict[str, object]:
    folder.chmod(0o755)
    for name, mode in (("readable", 0o644), ("private", 0o600)):
        (folder / name).write_text(SECRET)
        (folder / name).chmod(mode)
    target = folder / "target"
    target.touch()
    target.chmod(0o666)
    return {
        "port": port,
        "parent": os.getpid(),
        **{n: str(folder / n) for n in ("readable", "private", "target")},
    }


def check(told: dict[str, Any], mechanisms: Sequence[str], folder: Path) -> None:
    given = protections(mechanisms)
    assert SECRET not in told["environment"]
    assert told["open descriptors"] == []
    assert told["own files"] == "(1, 'x', 'in')"
    if "filesystem" in given:
        assert SECRET not in "".join(told[each] for each in ("environments", "readable file", "private file"))
        assert told["write beside"].endswith("Error")
        assert told["chmod"].endswith("Error")
        assert (folder / "target").read_text() == ""
    if "network" in given:
        assert told["connect"].endswith("Error")
        assert told["datagram"].endswith("Error")
    if "syscalls" in given and os.uname().machine == "x86_64":
        no = [-1, errno.EPERM]
        assert told["calls"] == [no, no, [-1, errno.ENOSYS], no, no]
    scoped = [each for each in mechanisms if each.startswith("landlock") and int(each.split()[1]) >= 6]
    if "pid namespace" in mechanisms or scoped:
        assert told["signal"] in ("PermissionError", "ProcessLookupError")
    if "process limit" in mechanisms:
        assert int(told["forks"]) <= 16
    if "pid namespace" not in mechanisms and scoped:
        # In a namespace the kernel ignores what would end the first process.
        assert told["signal the one above"] == "PermissionError"


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.setenv("BASCULE_TEST_SECRET", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        yield server


# In the launcher: all there is, no user namespaces (root only), no mounts in them.
@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ("pass", ()),
        ("launcher._NAMESPACES = launcher._NAMESPACES[1:]", ("user namespace",)),
        ("launcher.build_root = lambda *_, **__: launcher.os.stat('/gone')", ("mount namespace",)),
    ],
)
def test_attacks(
    tmp_path: Path,
    listener: socket.socket,
    change: str,
    lost: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        "import sys",
        "sys.path.insert(0, {root!r})",
        "from algorithms.rewards.isolation import launcher",
    ]
    monkeypatch.setattr("algorithms.rewards.sandbox._LAUNCH", "\n".join([*lines, change, "launcher.main()"]))
    files = {"places.json": json.dumps(places(tmp_path, listener.getsockname()[1]))}
    result = run(ATTACKS, stdin="in", files=files)
    assert (result.exit_code, result.stderr) == (0, "")
    check(json.loads(result.stdout), result.mechanisms, tmp_path)
    if lost != ("user namespace",) or os.geteuid() == 0:
        assert {*result.mechanisms} >= {*sandbox_support().mechanisms} - {*lost, "process limit"}
    if "network" in protections(result.mechanisms):
        with pytest.raises(TimeoutError):
            listener.accept()
    assert programs_left() == []


SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.mark.parametrize(
    ("python", "less"),
    [
        (sys.executable, ["no-namespaces"]),
        (SYSTEM_PYTHON, ["no-namespaces"]),
        (SYSTEM_PYTHON, ["nobody"]),
        (SYSTEM_PYTHON, ["nobody", "no-namespaces"]),
    ],
)
def test_attacks_where_less_is_allowed(
    tmp_path: Path, listener: socket.socket, python: str, less: list[str]
) -> None:
    """As root and as a user, and where namespaces are forbidden: what is said to hold does."""
    if python == SYSTEM_PYTHON:
        version = "import sys; sys.exit(sys.version_info < (3, 11))"
        if not Path(python).exists() or subprocess.run([python, "-c", version], check=False).returncode:
            pytest.skip("no Python 3.11 or later that every user may start")
        if os.geteuid() != 0:
            pytest.skip("only root can become another user")
        root = Path(__file__).parents[3]
        if any(not each.stat().st_mode & 0o001 for each in root.parents):
            pytest.skip("another user may not read this working tree")
    ran = subprocess.run(
        [python, "-c", WITH_LESS, *less],
        input=json.dumps([ATTACKS, places(tmp_path, listener.getsockname()[1]), MARK]),
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "SECRET": SECRET, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    mechanisms, stdout, stderr = json.loads(ran.stdout)
    assert stderr == ""
    check(json.loads(stdout), mechanisms, tmp_path)
    if "no-namespaces" in less:
        assert not [each for each in mechanisms if each.endswith("namespace")]
    if python == SYSTEM_PYTHON:
        # Root has become a user of its own.
        assert "process limit" in mechanisms
    assert programs_left() == []


def test_what_is_left_running_is_ended() -> None:
    """A daemon of its own session, whose parent has ended, holds no pipe open either."""
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(600)\n"
        "    os._exit(0)\n"
        "time.sleep(0.2)\n"
        "print('over')\n"
    )
    result = run(program)
    assert (result.exit_code, result.stdout) == (0, "over\n")
    assert result.seconds < 60
    assert programs_left() == []


def test_limits() -> None:
    slow = run("import time; print(1, flush=True); time.sleep(600)", limits=SandboxLimits(wall_s=3))
    assert (slow.exit_code, slow.limit, slow.timed_out, slow.stdout) == (None, "wall", True, "1\n")
    busy = run("while True: pass", limits=SandboxLimits(cpu_s=1, wall_s=60))
    assert (busy.limit, busy.timed_out) == ("cpu", True)
    ignoring = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(ignoring, limits=SandboxLimits(cpu_s=1, wall_s=60)).limit == "cpu"
    large = run("x = bytearray(4 << 30)")
    assert (large.exit_code, large.limit) == (1, None)
    assert "MemoryError" in large.stderr
    file = run("f = open('f', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20)); f.flush()")
    assert "[Errno 27] File too large" in file.stderr
    many = run("for n in range(64):\n    with open(f'{n}', 'wb') as f: f.write(bytes(8 << 20))")
    if "mount namespace" in many.mechanisms:
        assert "[Errno 28] No space left" in many.stderr
    descriptors = run("fs = [open('/dev/null') for _ in range(100)]")
    assert "[Errno 24] Too many open files" in descriptors.stderr
    assert programs_left() == []


def test_output_for_ever_is_cut_and_ended() -> None:
    for stream in ("stdout", "stderr"):
        result = run(
            f"import sys\nwhile True: sys.{stream}.write('x' * 10_000)",
            limits=SandboxLimits(output_bytes=100_000, wall_s=60),
        )
        assert (result.limit, result.exit_code, result.timed_out) == ("output", None, False)
        assert (len(result.stdout), len(result.stderr)) == (
            (100_000, 0) if stream == "stdout" else (0, 100_000)
        )


def test_programs_get_files_and_input(tmp_path: Path) -> None:
    text = "x" * 3_000_000
    program = "import sys, part.helper; print(part.helper.N, len(sys.stdin.read())); sys.exit(3)"
    result = run(program, stdin=text, files={"part/helper.py": "N = 7"})
    assert (result.exit_code, result.stdout) == (3, "7 3000000\n")
    # Nobody reads: the rest of the input is dropped.
    assert run_sandboxed("pass", stdin=text).exit_code == 0
    assert run_sandboxed(["/bin/sh", "-c", "cat; kill -SEGV $$"], stdin=b"\xff").stdout == "\ufffd"
    assert run_sandboxed(["/bin/sh", "-c", "kill -SEGV $$"]).exit_code == -11
    assert "SyntaxError" in run("(").stderr
    assert run("print('\ud800')").exit_code in (0, 1)
    assert run("import numpy").stderr.endswith("No module named 'numpy'\n")
    (tmp_path / "table").write_text("7")
    reading = f"print(open({str(tmp_path / 'table')!r}).read())"
    assert run(reading, readable=[str(tmp_path)]).stdout == "7\n"


def test_the_folder_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("import os; os.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0)")
    assert list(tmp_path.iterdir()) == []


def test_from_threads_at_once() -> None:
    with ThreadPoolExecutor(6) as pool:
        printed = list(pool.map(lambda n: run(f"print({n})").stdout, range(6)))
    assert printed == [f"{n}\n" for n in range(6)]


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "from algorithms.rewards.sandbox import run_sandboxed, SandboxLimits\n"
        f"run_sandboxed('import time; time.sleep(600)', limits=SandboxLimits(wall_s=600), files={{'{MARK}': ''}})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as parent:
        deadline = time.monotonic() + 30
        while not programs_left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert programs_left()
        parent.kill()
    deadline = time.monotonic() + 10
    while (programs_left() or list(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert programs_left() == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_required() -> None:
    given = sandbox_support().protections
    assert run("print(1)", require=given).stdout == "1\n"
    with pytest.raises(ConfigError, match="no protection 'files'; there is filesystem, network, processes"):
        run("", require=["files"])
    code = (
        f"{WITH_LESS.partition('program, places')[0]}\nfrom algorithms.rewards.sandbox import SandboxError\n"
        "try: run_sandboxed('print(1)', require=['filesystem', 'processes'])\n"
        "except SandboxError as error: print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "no-namespaces"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.startswith("the sandbox cannot give what `require` asks for: ")
    assert "processes" in ran.stdout
    assert "unshare: Operation not permitted" in ran.stdout
    assert set(given) <= set(PROTECTIONS)


def test_what_cannot_be_run() -> None:
    with pytest.raises(SandboxError, match="cannot start no-such-command: No such file"):
        run_sandboxed(["no-such-command"])
    for name in ("/etc/x", "../x", "", "a\0b"):
        with pytest.raises(ConfigError, match="files inside of its folder"):
            run("", files={name: ""})
