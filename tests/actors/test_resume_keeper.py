"""When states are saved and what happens to them, with ranks that write a file in place of a checkpoint."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.checkpoint_links import CheckpointLinks
from actors.ending import EndedEarlyError, Ending
from actors.metrics import RunRecorder
from actors.resume import StateKeeper
from actors.resume_state import read_state, states
from algorithms.data import Prompt, int_row
from algorithms.progress import Begun, Progress
from algorithms.prompts import PromptStream
from configs.errors import ConfigError, WriteError, naming
from configs.schema import RunConfig
from tests.actors.consoles import Console


class Trainers:
    def __init__(self, directory: Path) -> None:
        self.links = CheckpointLinks(directory)
        self.changes = 0
        self.fails = False
        self.loaded: list[Path] = []

    def step(self) -> None:
        self.changes += 1

    def begin_state(self, directory: Path, step: int) -> None:
        with naming(directory):
            (directory / "weights").write_text(str(self.changes))

    def written_state(self) -> tuple[list[bytes], float]:
        if self.fails:
            raise WriteError("weights: No space left on device")
        return [b""], 0.01

    def finish_state(self, directory: Path, step: int, written: Sequence[bytes]) -> None:
        (directory / "whole").write_text("")

    def load_state(self, directory: Path, *, same_layout: bool) -> None:
        self.loaded.append(directory)


class Rig:
    def __init__(self, directory: Path, **changed: Any) -> None:
        needed = {"model": {"model": "m"}, "data": {"dataset": "d"}, "algorithm": "sft", "max_steps": 50}
        self.config = RunConfig.model_validate({**needed, "checkpoint": {"resume_steps": 1}, **changed})
        self.directory, self.console = directory, Console()
        self.trainers: Any = Trainers(directory)
        prompts = [Prompt(id=f"p{n}", tokens=int_row([n]), messages=(), columns={}) for n in range(40)]
        self.stream = PromptStream(prompts, seed=0, shuffle=True)
        self.recorder = RunRecorder(directory, 50, self.console)

    @contextmanager
    def running(self) -> Iterator[StateKeeper]:
        ending = Ending(self.config, self.console, time.monotonic())
        with ending:
            keeper = StateKeeper(
                *(self.config, self.directory, self.trainers, self.recorder, {"prompts": self.stream}, None),
                ending,
            )
            with self.recorder, keeper:
                yield keeper

    def step(self, keeper: StateKeeper, number: int) -> None:
        self.stream.take(2)
        self.trainers.step()
        self.recorder.step(number, {"loss": 1.0, "tokens_per_second": 1.0})
        keeper.keep(Progress(step=number, version=number))


def names(directory: Path) -> list[str]:
    return [path.name for path in states(directory)]


def test_a_save_that_fails_hurts_no_older_one_and_is_reported(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    with rig.running() as keeper:
        rig.step(keeper, 1)
        rig.step(keeper, 2)
        keeper.settle()
        rig.trainers.fails = True
        rig.step(keeper, 3)
        rig.step(keeper, 4)
        assert names(tmp_path) == ["step-1", "step-2"]
        rig.trainers.fails = False
        rig.step(keeper, 5)
    assert names(tmp_path) == ["step-2", "step-5"]
    assert len(list((tmp_path / "resume").iterdir())) == 2
    failed = [line for line in rig.console.lines if "could not be saved" in line]
    assert [line.partition(" could")[0] for line in failed] == [
        "warning: the state of step 3",
        "warning: the state of step 4",
    ]
    assert all("No space left on device" in line for line in failed)


def test_a_directory_that_turns_read_only_costs_no_older_state(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    with rig.running() as keeper:
        rig.step(keeper, 1)
        keeper.settle()
        # As root there are no permissions: a file where the next state is written does the same.
        (tmp_path / "resume" / "step-2.bascule-partial").symlink_to("/proc/nothing")
        rig.step(keeper, 2)
    assert "step-1" in names(tmp_path)
    assert any("the state of step 2 could not be saved" in line for line in rig.console.lines)


def test_told_to_end_it_saves_what_is_done_and_says_so(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint={"resume_steps": 0})

    def told() -> None:
        with rig.running() as keeper:
            rig.step(keeper, 1)
            os.kill(os.getpid(), signal.SIGTERM)
            rig.step(keeper, 2)

    with pytest.raises(EndedEarlyError, match=r"ended after step 2; .* goes on after step 2"):
        told()
    assert names(tmp_path) == ["step-2"]
    state = read_state(tmp_path / "resume" / "step-2")
    assert state.manifest.streams["prompts"]["offset"] == 4
    assert state.manifest.files["metrics.jsonl"] == (tmp_path / "metrics.jsonl").stat().st_size


@pytest.mark.parametrize("has_trained", [False, True])
def test_of_a_step_that_is_broken_off_the_beginning_is_saved_if_it_still_is(
    tmp_path: Path, has_trained: bool
) -> None:
    rig = Rig(tmp_path, checkpoint={"resume_steps": 0}, cluster={"grace_s": 0.3})

    def broken_off() -> None:
        with rig.running() as keeper:
            rig.step(keeper, 1)
            rig.stream.take(2)
            if has_trained:
                rig.trainers.step()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(EndedEarlyError) as ended:
        broken_off()
    assert ended.value.exit_code == 143
    assert names(tmp_path) == ([] if has_trained else ["step-1"])
    if not has_trained:
        assert ended.value.saved == 1
        # Not that of the step that was broken off.
        assert read_state(tmp_path / "resume" / "step-1").manifest.streams["prompts"]["offset"] == 2


def test_it_goes_back_to_the_newest_state_or_to_the_beginning(tmp_path: Path) -> None:
    rig = Rig(tmp_path, checkpoint={"resume_steps": 2})
    with rig.running() as keeper:
        rig.step(keeper, 1)
        assert keeper.go_back() is None
        assert (keeper.start, rig.stream.state()) == (Progress(), {"epoch": 0, "offset": 0})
        rig.recorder.go_back(None)
        assert (tmp_path / "metrics.jsonl").read_text() == ""
        for number in (1, 2, 3):
            rig.step(keeper, number)
        keeper.settle()
        state = keeper.go_back()
        assert state is not None
        assert (keeper.start.step, rig.stream.state()["offset"]) == (2, 4)
        assert rig.trainers.loaded == [tmp_path / "resume" / "step-2"]
        rig.recorder.go_back(state)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
        # What happened stays on record.
        assert '"start"' in (tmp_path / "events.jsonl").read_text()


def test_what_is_sampled_ahead_is_part_of_it(tmp_path: Path) -> None:
    class Ahead:
        def settle(self) -> Sequence[Begun]:
            return [Begun(step=2, groups=())]

    rig = Rig(tmp_path)
    with rig.running() as keeper:
        keeper.keep(Progress(step=1), Ahead())
    assert (tmp_path / "resume" / "step-1" / "ahead.jsonl").is_file()


def test_a_directory_that_is_gone_ends_the_run_with_its_name(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "run")
    (tmp_path / "run").mkdir()

    def lost() -> None:
        with rig.running() as keeper:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
            rig.step(keeper, 1)

    with pytest.raises(WriteError, match=r"metrics\.jsonl is gone"):
        lost()


@pytest.mark.parametrize("kept", [1, 39])
def test_other_data_are_refused_by_name_also_where_they_are_fewer_than_were_drawn(
    tmp_path: Path, kept: int
) -> None:
    rig = Rig(tmp_path, checkpoint={"resume_steps": 2})
    with rig.running() as keeper:
        rig.step(keeper, 1)
        rig.step(keeper, 2)
        keeper.settle()
    fewer = {"prompts": PromptStream(rig.stream.items[:kept], seed=0, shuffle=True)}
    (saved,) = states(tmp_path)
    ending = Ending(rig.config, rig.console, time.monotonic())
    with pytest.raises(ConfigError, match=r"data: the prompts are not those that .*step-2 was saved with"):
        StateKeeper(rig.config, tmp_path, rig.trainers, rig.recorder, fewer, read_state(saved), ending)
