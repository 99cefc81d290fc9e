"""Running code that a model wrote: a process of its own, with limits, without the parent's secrets or network.

What this keeps out, what it does not, and what depends on the kernel is in docs/security.md.
"""

import contextlib
import functools
import marshal
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

from algorithms.rewards.isolation.program import PATH, protections
from configs.errors import BasculeError, ConfigError

PROTECTIONS = ("filesystem", "network", "processes", "syscalls")
MAIN = "main.py"
# Beyond the program's own time: the start, and the launcher's clean-up.
_MARGIN_S = 15.0
_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64"),
    *("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"),
)
_LAUNCH = (
    "import sys; sys.path.insert(0, {root!r}); from algorithms.rewards.isolation.launcher import main; main()"
)


class SandboxError(BasculeError):
    """A program could not be run as asked: what is missing on this machine, or why it did not start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLimits:
    """What a program may use. All but `wall_s`, `output_bytes` and `disk_bytes` hold for each of its processes."""

    wall_s: float = 10.0
    """From start to end, everything it started included."""
    cpu_s: float = 10.0
    """Processor time, rounded up to whole seconds."""
    memory_bytes: int = 1 << 30
    """Address space."""
    output_bytes: int = 1 << 20
    """Standard output and error, each; a program that writes more is ended."""
    file_bytes: int = 32 << 20
    """One file."""
    disk_bytes: int = 64 << 20
    """All files together; only with a mount namespace."""
    open_files: int = 64
    """Descriptors."""
    processes: int = 16
    """Processes and threads at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxResult:
    """How a program ended. Its output is text with invalid UTF-8 replaced, cut at `output_bytes`."""

    exit_code: int | None
    """None if it was ended for time or output; negative: killed by that signal."""
    stdout: str
    stderr: str
    limit: Literal["wall", "cpu", "output"] | None
    """The limit that ended it. What a program makes of a refused allocation, file or fork is its own affair."""
    seconds: float
    """From start to end, the sandbox's own time included."""
    mechanisms: tuple[str, ...]
    """What kept it apart: namespaces, `landlock ABI`, `seccomp`, `process limit`."""
    failures: tuple[str, ...]
    """What was tried to that end without success, and why."""

    @property
    def timed_out(self) -> bool:
        """Whether it ran out of time, by the clock or the processor's."""
        return self.limit in ("wall", "cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxSupport:
    """What the sandbox can do on this machine, for this user."""

    protections: tuple[str, ...]
    """Those of PROTECTIONS that it gives; limits, a clean environment and a deadline are always there."""
    mechanisms: tuple[str, ...]
    """What they rest on, as in SandboxResult."""
    failures: tuple[str, ...]
    """What was tried to that end without success, and why."""


@dataclass(kw_only=True, slots=True)
class _Output:
    """What comes out of a pipe, up to a size."""

    most: int
    parts: list[bytes] = field(default_factory=list[bytes])
    size: int = 0

    def add(self, data: bytes) -> bool:
        """Keep what there is room for; whether that was all."""
        self.parts.append(data[: self.most - self.size])
        self.size += len(self.parts[-1])
        return len(self.parts[-1]) == len(data)

    def text(self) -> str:
        return b"".join(self.parts).decode(errors="replace")


def run_sandboxed(
    program: str | Sequence[str],
    *,
    stdin: str | bytes = b"",
    files: Mapping[str, str | bytes] | None = None,
    limits: SandboxLimits | None = None,
    require: Sequence[str] = (),
    readable: Sequence[str] = (),
) -> SandboxResult:
    """Run `program`, Python source or a command as a list, in a new folder with `files`, and say how it ended.

    Python source runs as main.py of that folder with this interpreter and its standard library, nothing that
    was installed besides. `readable` are further absolute paths that a program may read. `require` names those
    of PROTECTIONS without which it is not run. Blocks; may be called from any thread. Raises ConfigError for
    arguments that make no sense, SandboxError if the program was not run.
    """
    limits = limits or SandboxLimits()
    unknown = [each for each in require if each not in PROTECTIONS]
    if unknown:
        raise ConfigError(f"the sandbox has no protection {unknown[0]!r}; there is {', '.join(PROTECTIONS)}")
    if sys.platform != "linux":
        raise SandboxError("the sandbox needs Linux")
    command = list(program)
    content = dict(files or {})
    if isinstance(program, str):
        command = [interpreter(), "-E", "-s", "-S", MAIN]
        content[MAIN] = program
    with tempfile.TemporaryDirectory(prefix="bascule-sandbox-", ignore_cleanup_errors=True) as folder:
        # A user of its own has to come through, not to look around.
        Path(folder).chmod(0o711)
        _write_files(Path(folder, "files"), content)
        Path(folder, "root").mkdir()
        task = {
            "command": command,
            "files": f"{folder}/files",
            "place": f"{folder}/root",
            "readable": [*_SYSTEM, *_interpreter_paths(), *readable],
            "require": list(require),
            "seconds": limits.wall_s,
            "cpu_seconds": limits.cpu_s,
            "memory": limits.memory_bytes,
            "file_size": limits.file_bytes,
            "disk": limits.disk_bytes,
            "open_files": limits.open_files,
            "processes": limits.processes,
        }
        given = stdin.encode(errors="replace") if isinstance(stdin, str) else stdin
        return _launch(task, given, limits)


@functools.lru_cache(maxsize=1)
def sandbox_support() -> SandboxSupport:
    """What the sandbox can do here, found out by running it. Raises SandboxError if it cannot run at all."""
    result = run_sandboxed("")
    return SandboxSupport(
        protections=protections(result.mechanisms), mechanisms=result.mechanisms, failures=result.failures
    )


def interpreter() -> str:
    """The Python that runs programs: this one, outside of its virtual environment."""
    here = Path(sys.executable).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = Path(sys.base_prefix, "bin", version)
    return str(base if base.exists() and not here.is_relative_to(sys.base_prefix) else here)


def _interpreter_paths() -> tuple[str, ...]:
    """Where the interpreter and its libraries are, links resolved or not."""
    return (sys.base_prefix, str(Path(sys.base_prefix).resolve()), str(Path(interpreter()).parents[1]))


def _write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in name:
            raise ConfigError(f"the sandbox takes files inside of its folder; {name!r} is not")
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        # A model may write what is no text: halves of surrogate pairs.
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))


def _launch(task: Mapping[str, object], stdin: bytes, limits: SandboxLimits) -> SandboxResult:
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        control, hold = _pipe(stack)
        report, to_report = _pipe(stack)
        fields = marshal.dumps({**task, "control": control.fileno(), "report": to_report.fileno()})
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _launcher(), fields.hex()],
                env={"PATH": PATH, "HOME": "/", "LANG": "C.UTF-8"},
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=(control.fileno(), to_report.fileno()),
                start_new_session=True,
            )
        )
        to_report.close()
        talk = _Talk(process=process, report=report, hold=hold, limits=limits)
        # The launcher ends all of it when this pipe closes, also when this process is killed.
        stack.callback(hold.close)
        talk.run(stdin)
    return _result(talk, process.returncode, limits, time.monotonic() - started)


def _launcher() -> str:
    return _LAUNCH.format(root=str(Path(__file__).resolve().parents[2]))


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    reading, writing = os.pipe()
    return stack.enter_context(os.fdopen(reading, "rb", 0)), stack.enter_context(os.fdopen(writing, "wb", 0))


class _Talk:
    """The pipes of a running launcher, read and written until it is done."""

    def __init__(
        self, *, process: subprocess.Popen[bytes], report: IO[bytes], hold: IO[bytes], limits: SandboxLimits
    ) -> None:
        self._process, self._hold = process, hold
        self._deadline = time.monotonic() + limits.wall_s + _MARGIN_S
        self.stdout = _Output(most=limits.output_bytes)
        self.stderr = _Output(most=limits.output_bytes)
        self.report = _Output(most=1 << 20)
        self.overflow = False
        assert process.stdout is not None
        assert process.stderr is not None
        self._streams = {process.stdout: self.stdout, process.stderr: self.stderr, report: self.report}
        self._reporting = report

    def run(self, stdin: bytes) -> None:
        """Write `stdin`, and read until the launcher has closed its report and the output has been seen."""
        assert self._process.stdin is not None
        waiting = memoryview(stdin)
        with selectors.DefaultSelector() as selector:
            for stream in self._streams:
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            os.set_blocking(self._process.stdin.fileno(), False)
            selector.register(self._process.stdin, selectors.EVENT_WRITE)
            while not self._reporting.closed:
                ready = selector.select(max(0.0, self._deadline - time.monotonic()))
                if not ready:
                    self._process.kill()
                    raise SandboxError("the sandbox did not end in time; the machine may be too busy")
                for key, _ in ready:
                    stream = cast(IO[bytes], key.fileobj)
                    if stream is self._process.stdin:
                        waiting = _write_some(stream, waiting)
                        done = not waiting
                    else:
                        done = self._read_some(stream)
                    if done:
                        selector.unregister(stream)
                        stream.close()
        # Whoever could still write is dead.
        for stream in self._streams:
            while not stream.closed and not self._read_some(stream):
                pass

    def _read_some(self, stream: IO[bytes]) -> bool:
        """Whether there is no more."""
        data = stream.read(1 << 16)
        if not data:
            return True
        if not self._streams[stream].add(data) and not self.overflow:
            self.overflow = True
            self._hold.close()
        return False


def _write_some(stream: IO[bytes], waiting: memoryview) -> memoryview:
    """What is still to be written; nothing if nobody reads."""
    if not waiting:
        return waiting
    try:
        return waiting[stream.write(waiting[: 1 << 16]) or 0 :]
    except BrokenPipeError:
        return waiting[:0]


def _result(talk: _Talk, code: int, limits: SandboxLimits, seconds: float) -> SandboxResult:
    data = b"".join(talk.report.parts)
    if not data and code >= 0:
        raise SandboxError(f"the sandbox failed (exit code {code}): {talk.stderr.text()[-2000:].strip()}")
    said: dict[str, Any] = marshal.loads(data) if data else {"notes": [], "end": "killed"}
    notes: list[tuple[str, str]] = said["notes"]
    told = dict(notes)
    if "lacks" in told:
        raise SandboxError(
            f"the sandbox cannot give what `require` asks for: {', '.join(told['lacks'].split())} "
            f"({'; '.join(_all(notes, 'failed'))}). Allow unprivileged user namespaces on this machine or in its "
            "container, or take it out of `require`"
        )
    if "error" in told:
        raise SandboxError(f"the sandbox cannot start {told['error']}")
    if "start" not in told and said["end"] == "exit":
        raise SandboxError(f"the sandbox failed (exit code {code}): {talk.stderr.text()[-2000:].strip()}")
    if said.get("left"):
        raise SandboxError("the sandbox could not end all that the program started; look for its processes")
    exit_code = int(told["exit"]) if "exit" in told else None
    limit: Literal["wall", "cpu", "output"] | None = None
    if talk.overflow:
        limit, exit_code = "output", None
    elif said["end"] == "time":
        limit = "wall"
    elif exit_code == -signal.SIGXCPU or (
        exit_code == -signal.SIGKILL and float(told["cpu"]) >= limits.cpu_s
    ):
        limit = "cpu"
    elif exit_code is None:
        # Something ended the launcher itself, as the kernel does when memory runs out.
        exit_code = -signal.SIGKILL
    return SandboxResult(
        exit_code=exit_code,
        stdout=talk.stdout.text(),
        stderr=talk.stderr.text(),
        limit=limit,
        seconds=seconds,
        mechanisms=_all(notes, "has"),
        failures=_all(notes, "failed"),
    )


def _all(notes: Sequence[tuple[str, str]], key: str) -> tuple[str, ...]:
    return tuple(value for each, value in notes if each == key)
