"""What was sampled ahead of a step, as a file of a state. No actors here."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from algorithms.data import Group, Prompt, Rollout, float_row, int_row
from algorithms.progress import Begun
from configs.errors import ConfigError, naming

_FILE = "ahead.jsonl"


def write_ahead(directory: Path, begun: Sequence[Begun]) -> None:
    """Write a line for each group; prompts by their ids. Raises WriteError naming the file."""
    if begun:
        path = directory / _FILE
        with naming(path):
            path.write_text("".join(json.dumps(row) + "\n" for each in begun for row in _rows(each)))


def read_ahead(directory: Path, prompts: Sequence[Prompt]) -> tuple[Begun, ...]:
    """What write_ahead wrote, nothing where nothing was. Raises ConfigError for a prompt that is not there."""
    path = directory / _FILE
    if not path.is_file():
        return ()
    by_id = {prompt.id: prompt for prompt in prompts}
    steps: dict[int, list[Group]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row["prompt"] not in by_id:
            raise ConfigError(f"{path}: prompt {row['prompt']} is not in the data")
        group = Group(prompt=by_id[row["prompt"]], rollouts=tuple(map(_rollout, row["rollouts"])))
        steps.setdefault(row["step"], []).append(group)
    return tuple(Begun(step=step, groups=tuple(groups)) for step, groups in sorted(steps.items()))


def _rows(begun: Begun) -> Iterator[dict[str, Any]]:
    for group in begun.groups:
        yield {"step": begun.step, "prompt": group.prompt.id, "rollouts": [*map(_row, group.rollouts)]}


def _row(rollout: Rollout) -> dict[str, Any]:
    return {
        "tokens": rollout.tokens.tolist(),
        # Exact: every float32 is a double, and JSON has enough digits for these.
        "logprobs": rollout.logprobs.tolist(),
        "text": rollout.text,
        "finish": rollout.finish,
        "loss_mask": rollout.loss_mask.tolist(),
        "versions": rollout.versions,
        "turns": [dict(turn) for turn in rollout.turns],
        "environment_reward": rollout.environment_reward,
    }


def _rollout(row: Mapping[str, Any]) -> Rollout:
    oldest, newest = row["versions"]
    return Rollout(
        tokens=int_row(row["tokens"]),
        logprobs=float_row(row["logprobs"]),
        text=row["text"],
        finish=row["finish"],
        loss_mask=int_row(row["loss_mask"]),
        versions=(oldest, newest),
        turns=tuple(row["turns"]),
        environment_reward=row["environment_reward"],
    )
