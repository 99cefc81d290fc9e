"""Reading the files of a run for the viewer, while they grow and as older versions wrote them."""

import json
from pathlib import Path

import pytest

from actors.metrics import RunRecorder
from actors.viewer.lines import JsonLines
from tests.actors.viewer_runs import HOSTILE, Console, opened, rows, write_grpo, write_old


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grpo(tmp_path_factory.mktemp("viewer") / "run")


def test_a_growing_file_gives_each_complete_line_once(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "x.jsonl")
    assert list(file.new()) == []
    file.path.write_bytes(b'{"step": 1}\n{"step": 2, "a": NaN}\n{"st')
    first, second = file.new()
    assert (first.offset, first.length, first.row) == (0, 12, {"step": 1})
    assert (second.offset, second.row) == (12, {"step": 2, "a": None})
    assert list(file.new()) == []
    with file.path.open("ab") as stream:
        stream.write(b'ep": 3}\nnonsense\n[1]\n{"no": "step"}\n')
    assert [line.row for line in file.new()] == [{"step": 3}]
    assert file.unreadable == 3
    assert not file.is_replaced()
    # A longer file with another beginning, and a shorter one with the same.
    content = file.path.read_bytes()
    file.path.write_bytes(b'{"step": 9}\n' + content)
    assert file.is_replaced()
    file.path.write_bytes(content[:13])
    assert file.is_replaced()


def test_series_are_the_rows_of_metrics(run_directory: Path) -> None:
    run = opened(run_directory)
    for name in run.series:
        points = [(row["step"], row[name]) for row in rows(run_directory / "metrics.jsonl") if name in row]
        (found,) = run.values([name], [0])
        assert list(zip(found["steps"], found["values"], strict=True)) == points
    assert run.series["loss"].values[1] is None
    assert run.series["eval/accuracy"].steps == [0, 6]


def test_old_runs_are_grouped_by_their_prompts(run_directory: Path, tmp_path: Path) -> None:
    new, old = opened(run_directory), opened(write_old(tmp_path / "old"))
    assert [
        (group.key, [(entry.index, entry.reward) for entry in group.entries]) for group in old.rollouts.groups
    ] == [
        (group.key, [(entry.index, entry.reward) for entry in group.entries]) for group in new.rollouts.groups
    ]
    state = old.state()
    assert (state["events"], state["token_steps"], state["algorithm"]) == ([], [], None)
    assert state["num_rollouts"] == 60


def test_tokens_belong_to_their_completions(run_directory: Path) -> None:
    rollouts = opened(run_directory).rollouts
    detail = rollouts.detail("train-5-0")
    assert detail is not None
    expected = [row for row in rows(run_directory / "tokens.jsonl") if row["step"] == 5]
    assert [each["record"]["tokens"] for each in detail["completions"]] == [row["tokens"] for row in expected]
    other = rollouts.detail("train-5-1")
    assert other is not None
    assert [each["record"] for each in other["completions"]] == [None] * 3
    assert other["completions"][1]["completion"] == f"{HOSTILE} step 5"
    assert rollouts.detail("train-99-0") is None


def test_a_prompt_that_comes_twice_in_a_step_has_two_groups_with_their_own_tokens(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    texts = ("a b", "c d")
    lines = [
        {"step": 1, "split": "train", "prompt_id": "p", "index": 0, "completion": text, "tokens": 2}
        for text in texts
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [
        {"step": 1, "prompt_id": "p", "index": 0, "tokens": [text[0], text[1:]]} for text in reversed(texts)
    ]
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rollouts = opened(tmp_path).rollouts
    for number, text in enumerate(texts):
        detail = rollouts.detail(f"train-1-{number}")
        assert detail is not None
        assert "".join(detail["completions"][0]["record"]["tokens"]) == text


def test_the_status_is_what_the_run_said_last(tmp_path: Path) -> None:
    with RunRecorder(tmp_path, 3, Console()) as recorder:
        recorder.step(1, {"loss": 1.0, "tokens_per_second": 1.0})
        assert opened(tmp_path).state()["status"] == "in progress"
    (tmp_path / "result.json").write_text("{}")
    assert opened(tmp_path).state()["status"] == "finished"
    for error, status in ((ValueError, "failed"), (KeyboardInterrupt, "interrupted")):
        with pytest.raises(error), RunRecorder(tmp_path, 3, Console()):
            raise error
        assert opened(tmp_path).state()["status"] == status
