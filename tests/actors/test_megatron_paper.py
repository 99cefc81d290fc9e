"""Plans on paper against Megatron itself: where it puts ranks, and which parameters it makes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bridge.families import family_of
from bridge.parameters import parameters_of
from tests.bridge.family_models import CONFIGS

pytestmark = pytest.mark.megatron

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What megatron_paper_worker.py says."""
    place = tmp_path_factory.mktemp("paper")
    worker = Path(__file__).with_name("megatron_paper_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(place)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Megatron warns of what every machine without CUDA lacks; none of it reaches a user.
    assert done.stderr == ""
    return json.loads((place / "answer.json").read_text())


def test_ranks_are_where_megatron_puts_them(answer: dict[str, Any]) -> None:
    assert len(answer["places"]) == 6 + 8 + 8 + 16 + 4 + 24
    for row in answer["places"]:
        assert row["paper"] == row["megatron"], row["rank"]


def test_parameters_without_megatron_are_those_that_megatron_makes(answer: dict[str, Any]) -> None:
    for name, config in CONFIGS.items():
        values = config.to_dict()
        spec = family_of(values).megatron(values)
        ours = {key: list(shape) for key, shape in parameters_of(spec, mtp=True).items()}
        assert ours == answer["parameters"][name], name


def test_a_plan_prints_nothing_but_the_plan(answer: dict[str, Any]) -> None:
    plan = answer["plan"]
    assert (plan["code"], plan["err"]) == (0, "")
    assert "ranks: 4" in plan["out"]
    assert "read per rank, every byte of its shard once" in plan["out"]
