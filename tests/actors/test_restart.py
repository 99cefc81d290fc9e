"""A loop whose trainer ranks are lost, with ranks that are none."""

from pathlib import Path

import pytest

from actors import restart
from actors.deadline import ActorLostError, DeadlineExceededError
from configs.errors import BasculeError
from tests.actors.run_helpers import rows
from tests.actors.test_resume_keeper import Rig, Trainers


class Lossy(Trainers):
    """Its ranks are found lost as often as there are errors to say so."""

    def __init__(self, directory: Path, lost: list[BasculeError]) -> None:
        super().__init__(directory)
        self.lost, self.restarts = lost, 0

    def find_lost(self) -> BasculeError | None:
        return self.lost.pop(0) if self.lost else None

    def restart(self) -> None:
        self.restarts += 1


def train(directory: Path, errors: list[BasculeError], lost: list[BasculeError]) -> Rig:
    """Run a loop that raises each of the errors and then ends."""
    rig = Rig(directory)
    rig.trainers = Lossy(directory, lost)

    def loop() -> None:
        if errors:
            raise errors.pop(0)

    with rig.running() as keeper:
        restart.train_on(loop, rig.config, rig.trainers, keeper, rig.recorder)
    return rig


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "_BACKOFF_S", 0.0)
    monkeypatch.setattr(restart, "write_bundle", lambda run, why: run)


def test_of_a_rank_that_only_waits_for_one_that_failed_both_are_named(tmp_path: Path) -> None:
    failed = BasculeError("train step: trainer rank 0 failed with RuntimeError('x')\nand so on")
    late = DeadlineExceededError("check of the trainers: no answer within 15 s from trainer rank 1")
    rig = train(tmp_path, [failed], [late])
    assert rig.trainers.restarts == 1
    why = f"{late} (during: train step: trainer rank 0 failed with RuntimeError('x'))"
    assert f"warning: {why}; the trainer ranks are started again" in rig.console.lines
    assert rows(tmp_path / "events.jsonl")[1]["text"].endswith(f"the run goes on from the beginning: {why}")


def test_an_error_of_ranks_that_are_all_there_is_raised(tmp_path: Path) -> None:
    with pytest.raises(BasculeError, match="not their fault"):
        train(tmp_path, [BasculeError("not their fault")], [])


def test_ranks_that_are_lost_without_a_new_step_end_the_run_by_name(tmp_path: Path) -> None:
    gone = [ActorLostError("check of the trainers: trainer rank 1 is gone") for _ in range(4)]
    errors = [BasculeError(f"broken pipe {number}") for number in range(4)]
    with pytest.raises(ActorLostError, match=r"rank 1 is gone\n\(during: broken pipe 3\)\n.*again 3 times"):
        train(tmp_path, errors, [*gone])
