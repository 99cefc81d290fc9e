"""Rows of rollouts.jsonl, written and read back, against what was in them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from algorithms.data import Scored, Verdict, float_row
from algorithms.stored_rollouts import read_rollouts, stored_row
from configs.errors import ConfigError
from tests.algorithms.rewards.groups import group


def scored(*texts: str, **columns: object) -> Scored:
    verdict = Verdict(value=0.5, parts={"style": 2.0}, notes={"why": "so"}, seconds=0.25)
    return Scored(
        group=group(*texts, **columns),
        rewards=float_row([0.5, float("nan")]),
        parts={"f": (0.5, None)},
        sources={"f": "abc"},
        verdicts={"f": (verdict, Verdict(error="it broke", timed_out=True))},
    )


def write(path: Path, *groups: tuple[int, str, Scored]) -> Path:
    rows = [stored_row(step, split, each, index) for step, split, each in groups for index in (0, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_says_what_each_reward_said() -> None:
    first, second = (stored_row(3, "train", scored("a", "b", answer="5"), index) for index in (0, 1))
    assert (first["reward"], second["reward"]) == (0.5, None)
    assert (first["reward_parts"], first["reward_notes"]) == ({"f": {"style": 2.0}}, {"f": {"why": "so"}})
    assert ("reward_errors" in first, second["reward_errors"]) == (False, {"f": "it broke"})
    assert (first["reward_seconds"], first["reward_sources"]) == ({"f": 0.25}, {"f": "abc"})
    assert (first["columns"], first["token_ids"]) == ({"answer": "5"}, [0, 9])


def test_groups_come_back_as_they_were(tmp_path: Path) -> None:
    plain = scored("a", "b", prompt="2+3=", answer={"deep": [1, None]})
    conversation = scored("c", "d", messages=[{"role": "user", "content": "2+3?"}])
    # The same prompt twice in a step.
    path = write(tmp_path / "r.jsonl", (1, "train", plain), (1, "train", plain), (1, "eval", conversation))
    first, again, last = read_rollouts(path)
    assert (first.step, first.split, last.split) == (1, "train", "eval")
    for found, given in ((first, plain), (again, plain), (last, conversation)):
        assert found.group.prompt.columns == given.group.prompt.columns
        assert found.group.prompt.messages == given.group.prompt.messages
        assert [each.text for each in found.group.rollouts] == [each.text for each in given.group.rollouts]
        assert [each.tokens.tolist() for each in found.group.rollouts] == [[0, 9], [1, 9]]
        assert (found.rewards, found.parts) == ((0.5, None), {"f": (0.5, None)})


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", (1, "train", scored("a", "b")))
    path.write_text(path.read_text()[:-5])
    (found,) = read_rollouts(path)
    assert len(found.group.rollouts) == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.jsonl: cannot be read: No such file"):
        list(read_rollouts(tmp_path / "none.jsonl"))
    path = tmp_path / "r.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"r.jsonl line 1: has no step, split, prompt_id"):
        list(read_rollouts(path))
    path.write_text("what\n")
    with pytest.raises(ConfigError, match="line 1: is no JSON"):
        list(read_rollouts(path))


def test_columns_json_does_not_have_are_text(tmp_path: Path) -> None:
    odd = replace(scored("a", "b", where=Path("/x")))
    (found,) = read_rollouts(write(tmp_path / "r.jsonl", (1, "train", odd)))
    assert found.group.prompt.columns["where"] == "/x"
