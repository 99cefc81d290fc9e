"""One run in a directory at a time."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from actors.run_lock import LOCK, hold, read_holder
from configs.errors import ConfigError

_HOLD = (
    "import sys, pathlib; from actors.run_lock import hold\n"
    "with hold(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def test_a_second_run_is_refused_by_name_until_the_first_is_gone_or_killed(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(ConfigError, match=f"in use by process {other.pid} on {socket.gethostname()}"),
        hold(run),
    ):
        pass
    found = read_holder(run)
    assert found is not None
    assert (found[0].pid, found[1]) == (other.pid, True)
    other.kill()
    other.communicate()
    found = read_holder(run)
    assert found is not None
    assert (found[0].pid, found[1]) == (other.pid, False)
    with hold(run) as lock:
        lock.tell_address("10.0.0.1:6379", "01000000", wants_token=True)
        found = read_holder(run)
        assert found is not None
        assert (found[0].pid, found[0].address, found[1]) == (os.getpid(), "10.0.0.1:6379", True)


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), hold(tmp_path / "file" / "run"):
        pass


def test_without_locks_a_holder_counts_while_it_may_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", none)
    path = tmp_path / LOCK
    # A process of this host that lives, one that does not, and one of a host that cannot be asked.
    for host, pid, refused in (
        (socket.gethostname(), 1, True),
        (socket.gethostname(), 1 << 30, False),
        ("x", 1, True),
    ):
        path.write_text(json.dumps({"host": host, "pid": pid, "started": "now", "address": None}))
        if refused:
            with pytest.raises(ConfigError, match=r"knows no locks .* remove"), hold(tmp_path):
                pass
        else:
            with hold(tmp_path):
                pass
            # Ended well, so that the next one need not ask.
            assert path.read_text() == ""
