"""What every process of an engine does at its start."""

import subprocess
import sys
from pathlib import Path

# In a process of its own, for a lock that tqdm has made is its for good.
_BAR = """
import io, multiprocessing, sys
from tqdm import std
from bridge.transport.registry import leave_no_semaphore

def child(is_told):
    if is_told:
        leave_no_semaphore()
    assert list(std.tqdm(range(3), file=io.StringIO())) == [0, 1, 2]
    # Made by tqdm for processes: in a spawned one it has a name in /dev/shm.
    sys.exit(getattr(std.TqdmDefaultWriteLock, "mp_lock", None) is not None)

if __name__ == "__main__":
    for is_told in (False, True):
        process = multiprocessing.get_context("spawn").Process(target=child, args=(is_told,))
        process.start()
        process.join()
        print(process.exitcode)
"""


def test_a_progress_bar_takes_no_named_semaphore(tmp_path: Path) -> None:
    script = tmp_path / "bar.py"
    script.write_text(_BAR)
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "0"], found.stderr
