"""When install refuses; that Megatron then computes the right numbers is in test_megatron_model.py."""

import importlib.metadata
import subprocess
import sys
from types import ModuleType

import pytest

from actors import megatron_cpu
from configs.errors import BasculeError


@pytest.fixture(autouse=True)
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide a hook that another test left in this process."""
    finders = [finder for finder in sys.meta_path if type(finder).__module__ != megatron_cpu.__name__]
    monkeypatch.setattr(sys, "meta_path", finders)


def test_refuses_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.0")
    with pytest.raises(BasculeError, match=r"megatron-core 0\.17\.0 is installed.*megatron-core==0\.16\.1"):
        megatron_cpu.install()


def test_refuses_when_megatron_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    with pytest.raises(BasculeError, match=r"megatron\.core is already imported.*before the first import"):
        megatron_cpu.install()


@pytest.mark.megatron
def test_installs_once_and_leaves_torch_cuda_alone() -> None:
    script = """
import sys, torch
before = dict(vars(torch.cuda))
finders = len(sys.meta_path)
from actors.megatron_cpu import install
assert len(sys.meta_path) == finders
assert "_bascule_cuda" not in vars(torch)
install()
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
count = len(sys.meta_path)
install()
assert len(sys.meta_path) == count
changed = [name for name, value in vars(torch.cuda).items() if before.get(name, value) is not value]
assert not changed, changed
tracker = CudaRNGStatesTracker()
tracker.add("dropout", 3)
with tracker.fork("dropout"):
    got = torch.rand(4)
assert torch.equal(got, torch.rand(4, generator=torch.Generator().manual_seed(3)))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
