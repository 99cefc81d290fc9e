"""`bascule submit`: a run as a job of a Ray cluster, followed to its end, with the exit code of the run itself.

Ray's own command line returns 1 for every failure and 0 for a job that was stopped.
"""

import asyncio
import logging
import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientError
from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient

from configs.errors import BasculeError, ConfigError
from configs.schema import RunConfig
from configs.words import as_words

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
INTERRUPTED, STOPPED = 130, 143
"""Exit codes of a job that was stopped: by Ctrl-C here, by someone else."""

_POLL_S = 1.0
# What two HTTP libraries and Ray raise for a cluster that is away, restarts, or refuses.
_AWAY = (OSError, RuntimeError, RayError, ClientError)
# How long a cluster may be out of reach before the job is left to itself.
_LOST_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """What is submitted, and where."""

    address: str
    """`http://HOST:8265` of the cluster's dashboard."""
    entrypoint: str
    """Command line for the cluster's shell."""
    working_dir: Path | None
    """Folder that travels with the job; None where the cluster's image has everything."""
    stop_wait_s: int
    """How long a job that is stopped may take to save, before it is killed."""
    job: str | None = None
    """Name of the job; by default Ray chooses one."""


def make_submission(
    config: RunConfig,
    *,
    address: str | None,
    python: str,
    working_dir: Path | None,
    stop_wait_s: int,
    job: str | None = None,
) -> Submission:
    """A job that runs this config. All options travel as words, so no file has to.

    Raises ConfigError for a missing address, a folder that is none, or an output_dir that the job would lose.
    """
    address = address or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
    if address is None or not address.startswith(("http://", "https://")):
        given = "" if address is None else f"; {address} is not one"
        raise ConfigError(
            f"--address: the cluster's dashboard, http://HOST:8265, here or as {ADDRESS_VARIABLES[0]}{given}"
        )
    if not config.output_dir.is_absolute():
        raise ConfigError(
            f"output_dir: {config.output_dir} would be in the job's own folder, which is gone afterwards; give a "
            "full path that all nodes can read, such as --output_dir /shared/runs/one"
        )
    if working_dir is not None and not working_dir.is_dir():
        raise ConfigError(f"--working_dir: {working_dir} is not a directory")
    words = [python, "-m", "actors.cli", config.algorithm, *as_words(config)]
    return Submission(
        address=address,
        entrypoint=shlex.join(words),
        working_dir=working_dir,
        stop_wait_s=stop_wait_s,
        job=job,
    )


def submit(submission: Submission, *, wait: bool, write: Callable[[str], None]) -> int:
    """Submit, and unless told otherwise follow the log; returns the exit code of the run, 0 without waiting.

    Ctrl-C stops the job, which may save first, and goes on following; the second one leaves it. `write` takes text
    as it comes. Raises BasculeError when the cluster does not answer or refuses.
    """
    client = _connect(submission.address)
    # It would list every file that stays.
    logging.getLogger("ray._private.runtime_env").setLevel(logging.WARNING)
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(submission.stop_wait_s)}}
    folder = {} if submission.working_dir is None else {"working_dir": str(submission.working_dir)}
    try:
        job = client.submit_job(
            entrypoint=submission.entrypoint,
            submission_id=submission.job,
            runtime_env=environment | folder,
        )
    # ValueError: the folder is too large or cannot be packed.
    except (*_AWAY, ValueError) as error:
        raise BasculeError(f"{submission.address} did not take the job: {_said(error)}") from error
    write(f"job {job} at {submission.address}\n")
    if not wait:
        write(f"follow it with: ray job logs --follow --address {submission.address} {job}\n")
        return 0
    return asyncio.run(_Followed(client, job, write).to_its_end())


def _connect(address: str) -> Any:
    # Ray takes these before what it is given.
    os.environ[ADDRESS_VARIABLES[0]] = address
    try:
        return JobSubmissionClient(address)
    except _AWAY as error:
        raise BasculeError(f"{address} does not answer as a Ray dashboard: {_said(error)}") from error


def _said(error: Exception) -> str:
    """The last line with words: Ray's messages hold a traceback of its own before what they have to say."""
    lines = [line.strip() for line in str(error).splitlines() if any(char.isalnum() for char in line)]
    return lines[-1] if lines else type(error).__name__


class _Followed:
    """A job and how much of its log has been shown."""

    def __init__(self, client: Any, job: str, write: Callable[[str], None]) -> None:
        self._client, self._job, self._write = client, job, write
        self._shown = 0
        self._interrupts = 0
        self._refused = False
        self._stopping: asyncio.Task[None] | None = None

    async def to_its_end(self) -> int:
        """The exit code, once the job has ended."""
        loop = asyncio.get_running_loop()
        left = asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, self._interrupt, left)
        following = asyncio.create_task(self._follow())
        leaving = asyncio.create_task(left.wait())
        await asyncio.wait({following, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if left.is_set():
            following.cancel()
            what = "goes on" if self._refused else "is being stopped"
            self._write(f"left job {self._job}, which {what}\n")
            return INTERRUPTED
        return self._code(following.result())

    async def _follow(self) -> Any:
        """What Ray knows of the job, once it has ended; its log is shown on the way.

        Raises BasculeError when the cluster is out of reach for too long.
        """
        loop = asyncio.get_running_loop()
        reached = loop.time()
        while True:
            try:
                at = 0
                async for text in self._client.tail_job_logs(self._job):
                    reached = loop.time()
                    # After a lost connection the log comes from its beginning again.
                    self._write(text[max(0, self._shown - at) :])
                    at += len(text)
                    self._shown = max(self._shown, at)
                info = await asyncio.to_thread(self._client.get_job_info, self._job)
                reached = loop.time()
                if info.status.is_terminal():
                    return info
            except _AWAY as error:
                if loop.time() - reached > _LOST_S:
                    raise BasculeError(
                        f"job {self._job}: nothing heard of the cluster for {_LOST_S:.0f} s ({_said(error)}); the "
                        "job may go on"
                    ) from error
            await asyncio.sleep(_POLL_S)

    def _interrupt(self, left: asyncio.Event) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            left.set()
            return
        self._write(f"\nstopping job {self._job}; it may save first. Ctrl-C once more leaves it\n")
        self._stopping = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        try:
            await asyncio.to_thread(self._client.stop_job, self._job)
        except _AWAY as error:
            self._refused = True
            self._write(f"job {self._job}: Ray did not stop it: {_said(error)}\n")

    def _code(self, info: Any) -> int:
        if info.status == "SUCCEEDED":
            return 0
        if info.status == "STOPPED":
            self._write(f"job {self._job} was stopped\n")
            return INTERRUPTED if self._interrupts and not self._refused else STOPPED
        code = info.driver_exit_code
        if not code:
            # Its command never ran, or its node is gone: the log does not tell.
            self._write(f"job {self._job} failed: {info.message}\n")
        return code or 1
