"""Other rewards in a run that goes on: `bascule reward reload` leaves a request in its directory, the run answers.

Files, because the two may run on different machines that share nothing but the run's directory.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from algorithms.rewards.loading import RewardSource
from configs.errors import BasculeError, ConfigError
from configs.rewards import RewardConfig

REWARDS = "rewards.yaml"
_HEAD = (
    "# The rewards of this run. Edit, here or in the functions' files, and run: bascule reward reload DIR\n"
)
_REQUEST = "reward-request.json"
_ANSWER = "reward-answer.json"


def write_rewards(directory: Path, rewards: Sequence[RewardConfig]) -> None:
    """rewards.yaml, with files' paths made absolute, and no request of an earlier run."""
    rows = [_absolute(each).model_dump(mode="json", exclude_defaults=True) for each in rewards]
    (directory / REWARDS).write_text(_HEAD + yaml.safe_dump(rows, sort_keys=False))
    for name in (_REQUEST, _ANSWER):
        (directory / name).unlink(missing_ok=True)


def _absolute(reward: RewardConfig) -> RewardConfig:
    place, colon, name = (reward.function or "").rpartition(":")
    if not colon or not place.endswith(".py"):
        return reward
    return reward.model_copy(update={"function": f"{Path(place).resolve()}:{name}"})


def read_rewards(directory: Path) -> tuple[RewardConfig, ...]:
    """What rewards.yaml says. Raises ConfigError naming the file and what is wrong in it."""
    path = directory / REWARDS
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; give the directory of a run of grpo"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no YAML: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path}: has to be a list of one reward at least, as `rewards` of a config is")
    found: list[RewardConfig] = []
    for number, row in enumerate(rows):
        try:
            found.append(RewardConfig.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, (number, *first["loc"])))
            raise ConfigError(f"{path}: {key}: {first['msg']}") from None
    return tuple(found)


def post_request(directory: Path, sources: Sequence[RewardSource], number: str) -> None:
    """Ask the run for these rewards; appears as a whole. The sources carry the text that was checked."""
    _write(directory / _REQUEST, {"number": number, "sources": rows_of(sources)})


def rows_of(sources: Sequence[RewardSource]) -> list[dict[str, Any]]:
    """Rewards with the text of their files, as JSON has them."""
    return [asdict(source) | {"config": source.config.model_dump(mode="json")} for source in sources]


def sources_of(rows: Sequence[Mapping[str, Any]]) -> tuple[RewardSource, ...]:
    """The rewards that rows_of wrote."""
    return tuple(
        RewardSource(**{**row, "config": RewardConfig.model_validate(row["config"])}) for row in rows
    )


def withdraw_request(directory: Path) -> bool:
    """Take the request back; False when the run has it already."""
    try:
        (directory / _REQUEST).unlink()
    except FileNotFoundError:
        return False
    return True


def take_request(directory: Path) -> tuple[str, tuple[RewardSource, ...]] | None:
    """The request that waits, if one does, which then waits no more."""
    path, taken = directory / _REQUEST, directory / f"{_REQUEST}.taken"
    try:
        path.rename(taken)
    except FileNotFoundError:
        return None
    content: dict[str, Any] = json.loads(taken.read_text())
    taken.unlink()
    return content["number"], sources_of(content["sources"])


def post_answer(directory: Path, number: str, *, step: int, error: str | None) -> None:
    """Say what became of a request: from which step on the rewards are used, or why they are not."""
    _write(directory / _ANSWER, {"number": number, "step": step, "error": error})


def read_answer(directory: Path, number: str) -> int | None:
    """The step from which on the rewards of this request are used; None while there is no answer.

    Raises BasculeError when the run refused them.
    """
    path = directory / _ANSWER
    if not path.is_file():
        return None
    answer = json.loads(path.read_text())
    if answer["number"] != number:
        return None
    if answer["error"] is not None:
        raise BasculeError(f"the run refused the rewards and keeps those it has: {answer['error']}")
    return answer["step"]


def _write(path: Path, content: object) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content))
    part.replace(path)
