"""Manifest, choice of the state, comparison of configs, truncation: without any actor."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from actors.resume_config import changes, is_same_layout
from actors.resume_schedule import Schedule, to_keep
from actors.resume_state import (
    Manifest,
    State,
    check_files,
    config_of,
    config_sha256,
    find_state,
    forget,
    read_state,
    states,
    truncate_files,
    write_manifest,
)
from algorithms.data import Prompt, int_row
from algorithms.progress import Progress
from algorithms.prompts import PromptStream
from configs.checkpoint import CheckpointConfig
from configs.errors import BasculeError, ConfigError
from configs.schema import RunConfig


def config(**changed: Any) -> RunConfig:
    needed = {"model": {"model": "m"}, "data": {"dataset": "d"}, "algorithm": "sft"}
    return RunConfig.model_validate({**needed, **changed})


def write(run: Path, step: int) -> Manifest:
    directory = run / "resume" / f"step-{step}"
    directory.mkdir(parents=True)
    now = config_of(config())
    manifest = Manifest(
        progress=Progress(step=step, version=2, best=0.5),
        config=now,
        config_sha256=config_sha256(now),
        streams={"samples": {"epoch": 1, "offset": 3, "sha256": "x"}},
        files={"metrics.jsonl": 4},
        links={"saved": {}, "scores": {}, "best": None},
        swapped=False,
    )
    write_manifest(directory, manifest)
    return manifest


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = write(tmp_path, 3)
    assert read_state(tmp_path / "resume" / "step-3") == State(
        directory=tmp_path / "resume" / "step-3", manifest=manifest
    )


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    write(tmp_path, 3)
    path = tmp_path / "resume" / "step-3" / "manifest.json"
    whole = path.read_text()
    content = json.loads(whole)
    content["config"]["seed"] = 7
    for text in (whole[:40], "{}", json.dumps(content)):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"manifest\.json"):
            read_state(path.parent)


def test_the_newest_complete_state_is_taken_unless_the_run_has_finished(tmp_path: Path) -> None:
    assert find_state(config(), tmp_path) is None
    for step in (2, 10):
        write(tmp_path, step)
    (tmp_path / "resume" / "step-12.bascule-partial").mkdir()
    found = find_state(config(), tmp_path)
    assert found is not None
    assert found.step == 10
    assert find_state(config(checkpoint={"resume": "never"}), tmp_path) is None
    (tmp_path / "result.json").write_text('{"finished": false}')
    assert find_state(config(), tmp_path) == found
    (tmp_path / "result.json").write_text("{}")
    assert find_state(config(), tmp_path) is None
    found = find_state(config(checkpoint={"resume": str(tmp_path / "resume" / "step-2")}), tmp_path)
    assert found is not None
    assert found.step == 2
    with pytest.raises(ConfigError, match="is no complete state of"):
        find_state(config(checkpoint={"resume": str(tmp_path / "resume" / "step-3")}), tmp_path)


def test_older_states_later_ones_and_unfinished_ones_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 11):
        write(tmp_path, step)
    (tmp_path / "resume" / "step-4.bascule-partial").mkdir()
    forget(tmp_path, lambda steps: {3, 10} & {*steps})
    assert [path.name for path in states(tmp_path)] == ["step-3", "step-10"]
    assert len(list((tmp_path / "resume").iterdir())) == 2


def test_files_are_cut_to_what_they_were_and_a_shorter_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("one\ntwo\nhal")
    check_files(tmp_path, {"metrics.jsonl": 4})
    truncate_files(tmp_path, {"metrics.jsonl": 4})
    assert (tmp_path / "metrics.jsonl").read_text() == "one\n"
    with pytest.raises(BasculeError, match=r"metrics\.jsonl: has 4 bytes, but had 5"):
        check_files(tmp_path, {"metrics.jsonl": 5})


def test_changes_are_named_with_what_they_mean() -> None:
    before = config_of(config())
    assert changes(before, before, 3) == []
    longer = config_of(config(max_steps=200, exist_ok=True, trainer={"tensor_model_parallel_size": 2}))
    assert changes(before, longer, 3) == [
        "max_steps: 100 -> 200: the learning-rate schedule goes on as if the run had had this length "
        "from its start",
        "trainer.tensor_model_parallel_size: 1 -> 2: another layout: results may differ in rounding from here on, "
        "and random numbers of dropout begin anew",
    ]
    assert is_same_layout(before, config_of(config(trainer={"micro_batch_size": 2})))
    assert not is_same_layout(before, longer)


def test_changes_that_a_state_does_not_survive_are_refused_by_name() -> None:
    before = config_of(config())
    vision = {"freeze_vit": False, "fps": 1.0}
    now = config(seed=1, max_steps=3, model={"model": "n"}, trainer={"lr": 1.0}, vision=vision)
    with pytest.raises(ConfigError) as refused:
        changes(before, config_of(now), 3)
    for line in (
        "seed: 42 -> 1: ",
        "max_steps: 100 -> 3: step 3 is done",
        "model.model: m -> n: ",
        "trainer.lr: ",
        "vision.freeze_vit: True -> False: ",
        "vision.fps: 2.0 -> 1.0: ",
    ):
        assert line in str(refused.value)


def test_a_digest_tells_rows_from_other_rows() -> None:
    def items(*rows: list[int]) -> str:
        prompts = [Prompt(id="", tokens=int_row(row), messages=(), columns={}) for row in rows]
        return PromptStream(prompts, seed=0, shuffle=False).digest()

    assert items([1, 2], [3]) == items([1, 2], [3])
    assert len({items([1, 2], [3]), items([1], [2, 3]), items([3], [1, 2])}) == 3


def test_which_states_are_kept() -> None:
    steps, scores = [2, 4, 5, 6, 7], {2: 0.9, 4: 0.9, 6: 0.1}
    assert to_keep(steps, CheckpointConfig(), scores) == {6, 7}
    settings = CheckpointConfig(resume_keep=1, resume_keep_every=5, resume_keep_best=True)
    assert to_keep(steps, settings, scores) == {2, 5, 7}


def test_when_a_state_is_due() -> None:
    every = Schedule(CheckpointConfig(resume_steps=4, resume_keep_every=6, resume_keep_best=True))
    due = [step for step in range(1, 13) if every.is_due(step, is_best=step == 5)]
    assert due == [4, 5, 6, 8, 12]
    never = Schedule(CheckpointConfig(resume_steps=0))
    assert not any(never.is_due(step, is_best=True) for step in range(1, 9))


def test_auto_costs_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    schedule = Schedule(CheckpointConfig())
    assert schedule.is_due(1, is_best=False)
    schedule.began(2.0)
    now = 1037.9
    assert not schedule.is_due(2, is_best=False)
    now = 1038.1
    assert schedule.is_due(3, is_best=False)
    # A disk that takes a minute is left in peace for another.
    schedule.ended(60.0)
    assert not schedule.is_due(4, is_best=False)
    now = 1118.1
    assert schedule.is_due(5, is_best=False)
