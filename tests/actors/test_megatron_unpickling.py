"""A torch_dist checkpoint that would run code when it is read."""

import builtins
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from actors.megatron_unpickling import UntrustedPickleError, data_only, read_metadata

# torch says that it is one process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Exploit:
    """Unpickles by calling `function` on `argument`."""

    def __init__(self, function: Any, argument: str) -> None:
        self._call = function, (argument,)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self._call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A real one, as torch writes it, with an object beside the tensors."""
    state = {
        "weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "step": 3,
    }
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def test_what_torch_has_written_reads_as_torch_reads_it(checkpoint: Path) -> None:
    expected = FileSystemReader(checkpoint).read_metadata()
    found = read_metadata(checkpoint)
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data
    state = {"weight": torch.zeros(2, 3), "half": torch.zeros(2, dtype=torch.bfloat16), "step": 0}
    with data_only():
        dcp.load(state, checkpoint_id=checkpoint, planner=DefaultLoadPlanner(), no_dist=True)
    assert state["step"] == 3
    assert torch.equal(state["weight"], torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "function", [os.system, builtins.eval, builtins.getattr, torch.load, torch.hub.load_state_dict_from_url]
)
def test_metadata_that_would_call_something_is_refused(checkpoint: Path, function: Any) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Exploit(function, f"touch {checkpoint / 'ran'}")))
    with pytest.raises(
        UntrustedPickleError, match=rf"\.metadata: asks for .*{function.__name__}, .* not loaded"
    ):
        read_metadata(checkpoint)
    assert not (checkpoint / "ran").exists()


@pytest.mark.parametrize(
    ("module_name", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"),
        ("torch", "float32.__reduce__"),
    ],
)
def test_a_name_with_dots_leads_nowhere(checkpoint: Path, module_name: str, name: str) -> None:
    words = (pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module_name, name))
    (checkpoint / ".metadata").write_bytes(b"\x80\x04" + b"".join(words) + pickle.STACK_GLOBAL + pickle.STOP)
    with pytest.raises(UntrustedPickleError, match="asks for"):
        read_metadata(checkpoint)


def test_metadata_of_another_type_is_refused(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UntrustedPickleError, match="holds dict, not the metadata"):
        read_metadata(checkpoint)


def test_an_object_beside_the_tensors_that_would_run_code_is_refused(tmp_path: Path) -> None:
    ran, ran_without = tmp_path / "ran", tmp_path / "ran-without"
    for path, guarded in ((ran_without, False), (ran, True)):
        dcp.save(
            {"step": Exploit(os.system, f"touch {path}")},
            checkpoint_id=tmp_path / path.name[::-1],
            no_dist=True,
        )

        def load(name: str = path.name[::-1]) -> None:
            dcp.load({"step": 0}, checkpoint_id=tmp_path / name, no_dist=True)

        if guarded:
            with data_only(), pytest.raises(BaseException, match=r"(?i)weights.only"):
                load()
        else:
            load()
    # The first shows that the second would have.
    assert ran_without.exists()
    assert not ran.exists()


def test_torch_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(name, raising=False)
    stored = io.BytesIO()
    torch.save(io.BytesIO(b"extra state"), stored)
    with data_only():
        stored.seek(0)
        assert torch.load(stored, weights_only=False).getvalue() == b"extra state"
    assert name not in os.environ
