"""One process with the imports of all worker scripts of the Megatron tests, for a session."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.actors.megatron_processes import RunWorkers, log_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunWorkers]:
    """All ranks of the session are forked from one process, which is started when first asked for."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    said = tmp_path_factory.mktemp("server") / "log"
    with (
        said.open("w") as stream,
        subprocess.Popen(
            [sys.executable, "-m", "tests.actors.megatron_server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            start_new_session=True,
        ) as server,
    ):
        questions, answers = server.stdin, server.stdout
        assert questions
        assert answers

        def run(
            script: Path, world_size: int, directory: Path, *, prefix: str = "", timeout_s: float = 240
        ) -> list[dict[str, Any]]:
            logs = [log_of(directory, rank, prefix) for rank in range(world_size)]
            job = {"script": str(script), "world_size": world_size, "directory": str(directory)}
            job |= {"logs": [str(log) for log in logs], "timeout_s": timeout_s}
            questions.write(json.dumps(job) + "\n")
            questions.flush()
            answer = answers.readline()
            assert answer, said.read_text()[-5000:]
            for log, code in zip(logs, json.loads(answer), strict=True):
                assert code == 0, log.read_text()[-5000:]
            return [
                json.loads((directory / f"{prefix}{rank}.json").read_text()) for rank in range(world_size)
            ]

        yield run
        # Its ranks too, where a test was interrupted.
        os.killpg(server.pid, signal.SIGKILL)
