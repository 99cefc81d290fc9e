"""A job that is followed, with a cluster that a few lines stand in for; test_job_submit.py has a real one."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from actors import submit
from actors.submit import Submission


@dataclass
class Cluster:
    """Gets Ctrl-C while the log is read, refuses to stop the job, and ends it once that was said."""

    ends_as: JobStatus
    written: list[str]
    interrupts: int = 1
    asked: list[str] = field(default_factory=list)

    def submit_job(self, **_: Any) -> str:
        return "one"

    def stop_job(self, job: str) -> bool:
        self.asked.append(job)
        # As Ray says it: a traceback of its own, then the reason.
        raise RuntimeError(
            "Request failed with status code 500: Traceback ...\nValueError: the node is gone\n."
        )

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for number in range(self.interrupts):
            os.kill(os.getpid(), signal.SIGINT)
            async with asyncio.timeout(10):
                while number == 0 and not any("did not stop" in text for text in self.written):
                    await asyncio.sleep(0.01)
        yield "step 2\n"
        if self.interrupts > 1:
            await asyncio.sleep(10)

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=self.ends_as, driver_exit_code=0, message="")


def follow(monkeypatch: pytest.MonkeyPatch, ends_as: JobStatus, interrupts: int = 1) -> tuple[int, str]:
    written: list[str] = []
    cluster = Cluster(ends_as, written, interrupts)
    monkeypatch.setattr(submit, "JobSubmissionClient", lambda address: cluster)
    monkeypatch.setenv(submit.ADDRESS_VARIABLES[0], "")
    submission = Submission(address="http://h:1", entrypoint="x", working_dir=None, stop_wait_s=1)
    code = submit.submit(submission, wait=True, write=written.append)
    assert cluster.asked == ["one"]
    return code, "".join(written)


def test_a_stop_that_ray_refuses_is_told_and_the_log_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = follow(monkeypatch, JobStatus.SUCCEEDED)
    assert code == 0
    assert text.endswith("job one: Ray did not stop it: ValueError: the node is gone\nstep 2\n")


def test_a_job_that_somebody_else_then_stops_was_not_stopped_from_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, text = follow(monkeypatch, JobStatus.STOPPED)
    assert (code, text.splitlines()[-1]) == (submit.STOPPED, "job one was stopped")


def test_a_second_ctrl_c_leaves_a_job_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = follow(monkeypatch, JobStatus.RUNNING, interrupts=2)
    assert (code, text.splitlines()[-1]) == (submit.INTERRUPTED, "left job one, which goes on")
