"""One call of an environment: its arguments by name, and what it gave as a reply."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from algorithms.data import Message, Prompt
from algorithms.environments.loading import Environment
from algorithms.rewards.calling import shown
from algorithms.rewards.loading import error_line
from algorithms.rewards.signature import Signature
from configs.errors import BasculeError

_KEYS = ("observation", "role", "reward", "done")
_ROLES = ("tool", "user")


class EnvironmentFailedError(BasculeError):
    """An environment raised, hung, or gave what is no reply. Names it, the prompt, the turn and what happened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What an environment said to one turn, or why it said nothing.

    The episode ends when it is `done`, and where there is an `error`. Without an `observation` it is done. A
    `role` of None is the config's.
    """

    observation: str | None = None
    role: str | None = None
    reward: float | None = None
    done: bool = False
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A turn to reply to: the last of `turns`, which the model has just ended. `number` is given by the sender."""

    number: int
    episode: str
    prompt: Prompt
    turns: tuple[Message, ...]

    @property
    def turn(self) -> int:
        """The number of the model's turn, from 1."""
        return sum(message["role"] == "assistant" for message in self.turns)

    def replayed(self) -> "list[Step]":
        """The steps of the episode up to this one, the last of which it is."""
        ends = [place for place, each in enumerate(self.turns) if each["role"] == "assistant"]
        return [
            Step(number=self.number, episode=self.episode, prompt=self.prompt, turns=self.turns[: end + 1])
            for end in ends
        ]

    def title(self, name: str) -> str:
        """What to call it in messages about the environment `name`."""
        return f"environment {name}: prompt {self.prompt.id}, turn {self.turn}"


def make_object(environment: Environment, step: Step) -> object:
    """A new object for the step's episode. Raises what its constructor raises, EnvironmentFailedError."""
    assert environment.made is not None, "a class"
    assert environment.init is not None, "a class"
    offered = _of_prompt(step.prompt)
    chosen = _chosen(offered, environment.init, step, environment.name)
    return environment.made(**(chosen | dict(environment.kwargs)))


def arguments_of(environment: Environment, step: Step) -> dict[str, Any]:
    """What is given after this turn, by name. Raises EnvironmentFailedError for a column that is missing."""
    offered = _of_prompt(step.prompt) | {
        "completion": step.turns[-1]["content"],
        "turns": [dict(turn) for turn in step.turns],
    }
    chosen = _chosen(offered, environment.signature, step, environment.name)
    return chosen | (dict(environment.kwargs) if environment.made is None else {})


def read_reply(value: object, title: str) -> Reply:
    """What a call gave: None to end, a text, or a dict. Raises EnvironmentFailedError naming `title`."""
    if value is None:
        return Reply(done=True)
    if isinstance(value, str):
        return Reply(observation=value)
    if not isinstance(value, Mapping):
        raise EnvironmentFailedError(
            f"{title}: gave {shown(value)}; it gives None to end, a text, or a dict of {', '.join(_KEYS)}"
        )
    given = {str(name): each for name, each in cast(Mapping[object, object], value).items()}
    unknown = [name for name in given if name not in _KEYS]
    if unknown:
        raise EnvironmentFailedError(f"{title}: gave {unknown[0]!r}; a dict has {', '.join(_KEYS)}")
    observation, role = given.get("observation"), given.get("role")
    if observation is not None and not isinstance(observation, str):
        raise EnvironmentFailedError(
            f"{title}: gave the observation {shown(observation)}; it is a text or None"
        )
    if role is not None and role not in _ROLES:
        raise EnvironmentFailedError(f"{title}: gave the role {shown(role)}; it is tool or user")
    done = given.get("done", False)
    if not isinstance(done, bool):
        raise EnvironmentFailedError(f"{title}: gave `done` {shown(done)}; it is True or False")
    return Reply(
        observation=observation,
        role=role,
        reward=_number(given.get("reward"), title),
        done=done or observation is None,
    )


def failure(environment: Environment, title: str, error: BaseException) -> str:
    """What to say of a call that raised: the exception and the line of the user's file."""
    return f"{title}: {type(error).__name__}: {error} ({error_line(error, environment.path)})"


def too_late(title: str, timeout_s: float) -> str:
    """What to say of a call that did not end in time."""
    return f"{title}: no answer within {timeout_s:g} s; make it faster or raise environment.timeout_s"


def _of_prompt(prompt: Prompt) -> dict[str, Any]:
    messages = [dict(message) for message in prompt.messages]
    return {**prompt.columns, "prompt": prompt.text, "messages": messages}


def _chosen(offered: Mapping[str, Any], signature: Signature, step: Step, name: str) -> dict[str, Any]:
    """What is asked for by name; with `**kwargs` the columns too."""
    for argument in signature.needs:
        if argument not in offered:
            raise EnvironmentFailedError(
                f"{step.title(name)}: it asks for {argument!r}, which this row of the dataset lacks"
            )
    wanted = {*signature.needs, *signature.takes}
    if signature.takes_all:
        wanted |= {column for column in step.prompt.columns if column not in signature.arguments}
    return {argument: value for argument, value in offered.items() if argument in wanted}


def _number(value: object, title: str) -> float | None:
    if value is None:
        return None
    # Numbers of numpy and bools are numbers as well.
    if isinstance(value, numbers.Real) and math.isfinite(float(value)):
        return float(value)
    raise EnvironmentFailedError(f"{title}: gave the reward {shown(value)}; it is a finite number or None")
