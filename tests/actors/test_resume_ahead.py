"""What was sampled ahead is the same after it was in a state."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from actors.resume_ahead import read_ahead, write_ahead
from algorithms.data import Group, Prompt, Rollout, float_row, int_row
from algorithms.progress import Begun
from configs.errors import ConfigError


def test_groups_come_back_exactly(tmp_path: Path) -> None:
    prompts = [Prompt(id=f"p{n}", tokens=int_row([n]), messages=(), columns={"n": n}) for n in range(3)]
    rollout = Rollout(
        tokens=int_row([5, 6, 7]),
        # Not numbers of few digits, and the smallest that float32 has.
        logprobs=float_row([-1 / 3, np.finfo(np.float32).tiny, -np.float32(0.1)]),
        text="a\nß",
        finish="length",
        loss_mask=int_row([1, 0, 1]),
        versions=(3, 4),
        turns=({"role": "assistant", "content": "x"},),
        environment_reward=0.1,
    )
    begun = [
        Begun(step=4, groups=(Group(prompt=prompts[2], rollouts=(rollout, rollout)),)),
        Begun(step=5, groups=(Group(prompt=prompts[0], rollouts=(rollout,)),)),
    ]
    write_ahead(tmp_path, begun)
    found = read_ahead(tmp_path, prompts)
    assert [(each.step, [group.prompt for group in each.groups]) for each in found] == [
        (4, [prompts[2]]),
        (5, [prompts[0]]),
    ]
    for field in fields(Rollout):
        one, other = (getattr(each, field.name) for each in (rollout, found[0].groups[0].rollouts[1]))
        assert np.array_equal(one, other), field.name
        assert type(one) is type(other)
    with pytest.raises(ConfigError, match="prompt p2 is not in the data"):
        read_ahead(tmp_path, prompts[:1])
    assert read_ahead(tmp_path / "nothing", prompts) == ()
