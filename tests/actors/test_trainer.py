"""What the group asks of its ranks, with ranks that only write it down."""

from pathlib import Path
from typing import Any, cast

import pytest

from actors import deadline, trainer
from actors.model_source import ModelSource
from actors.placement import Reservation
from actors.trainer_rank import Sources, Started
from bridge.plan import Plan
from configs.schema import RunConfig


class Method:
    """A method of an actor; the call is its own outcome."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]]) -> None:
        self._name, self._calls = name, calls

    def remote(self, *arguments: Any) -> Any:
        self._calls.append((self._name, *arguments))
        return (
            Started(plan=Plan(tensors=(), pieces={}), warnings=(), changing=frozenset())
            if self._name == "start"
            else None
        )


class Rank:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Method:
        return Method(name, self.calls)


def test_checkpoints_are_numbered_by_the_runs_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one too, and not by optimizer steps, of which a step may have several."""
    ranks = [Rank(), Rank()]
    monkeypatch.setattr(trainer, "start_ranks", lambda *_, **__: ranks)
    monkeypatch.setattr(deadline, "get", lambda found, *_, **__: found)
    monkeypatch.setattr(deadline, "get_all", lambda found, *_, **__: found)
    config = RunConfig.model_validate(
        {
            "max_steps": 5,
            "model": {"model": "m"},
            "data": {"dataset": "d"},
            "trainer": {"data_parallel_size": 2},
            "grpo": {"num_iterations": 3},
            "rewards": [{"function": "r"}],
        }
    )
    sources = Sources(model=ModelSource(directory=tmp_path))
    group = trainer.TrainerGroup(config, cast(Reservation, None), "cpu", sources, tmp_path)
    group.save(2)
    assert group.save_last() == tmp_path / "checkpoint"
    for rank in ranks:
        saves = [call for call in rank.calls if call[0] == "save"]
        assert saves == [("save", tmp_path / "checkpoint-2", 2), ("save", tmp_path / "checkpoint", 5)]
