"""How a reward is called: what its signature asks for tells."""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from configs.errors import ConfigError

Style = Literal["sample", "batch", "group", "turn", "episode"]

# What a function may ask for besides the dataset's columns; a column of the same name is hidden.
ARGUMENTS: Mapping[Style, tuple[str, ...]] = {
    "sample": ("completion", "turns", "prompt", "messages", "tokens", "finish"),
    "batch": (
        *("completions", "turns", "prompts", "messages", "completion_ids", "response_token_ids"),
        *("finish_reason", "is_truncated", "log_extra", "log_metric"),
    ),
    "group": ("group",),
    "turn": ("completion", "turns", "prompt", "messages"),
    "episode": ("prompt", "messages"),
}
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """How a reward is called.

    `sample`: once for each completion. `batch`: once for the completions of a prompt, everything in lists.
    `group`: once with the algorithms.data.Group. Of an environment, `turn`: after each turn of the model;
    `episode`: when an object is made for an episode. `needs` are arguments without a default, `takes` those with
    one, fixed kwargs in neither; `takes_all` says that it has `**kwargs`.
    """

    style: Style
    is_async: bool
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    takes_all: bool

    @property
    def arguments(self) -> tuple[str, ...]:
        """What a call of this style offers besides the dataset's columns."""
        return ARGUMENTS[self.style]

    def describe(self) -> str:
        """`called once per completion with (completion, answer)`, and whether it is async."""
        each = {
            "sample": "per completion",
            "batch": "per prompt, with lists",
            "group": "per prompt, with the group",
            "turn": "per turn",
            "episode": "per episode",
        }
        names = [
            *self.needs,
            *(f"{name}=" for name in self.takes),
            *(["**columns"] if self.takes_all else []),
        ]
        return f"{'async, ' if self.is_async else ''}called once {each[self.style]}: ({', '.join(names)})"


def read_signature(
    function: Callable[..., object],
    fixed: Collection[str],
    spelled: str,
    *,
    style: Style | None = None,
    noun: str = "reward",
) -> Signature:
    """How `function` is called when `fixed` arguments are given anyway; what it asks for tells, unless `style` is
    given. Raises ConfigError."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise ConfigError(f"{noun} {spelled}: its arguments cannot be read; wrap it in a function") from None
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    for each in parameters:
        if each.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ConfigError(
                f"{noun} {spelled}: {each.name!r} is positional-only; arguments are given by name"
            )
    names = [each.name for each in parameters if each.kind in _BY_NAME]
    for name in fixed:
        if name not in names and not takes_all:
            raise ConfigError(
                f"{noun} {spelled}: `kwargs` gives {name!r}, which the function does not take; it takes "
                f"{', '.join(names) or 'nothing'}"
            )
    free = [each for each in parameters if each.kind in _BY_NAME and each.name not in fixed]
    return Signature(
        style=style or ("group" if "group" in names else "batch" if "completions" in names else "sample"),
        is_async=is_async(function),
        needs=tuple(each.name for each in free if each.default is inspect.Parameter.empty),
        takes=tuple(each.name for each in free if each.default is not inspect.Parameter.empty),
        takes_all=takes_all,
    )


def is_async(function: Callable[..., object]) -> bool:
    """Whether a call gives something to await; also of an object with an async `__call__`."""
    if inspect.iscoroutinefunction(function):
        return True
    return inspect.iscoroutinefunction(type(function).__call__)


def check_arguments(
    signature: Signature, spelled: str, columns: Collection[str], *, noun: str = "reward"
) -> None:
    """Raises ConfigError when the function asks for what neither a call nor the dataset's `columns` have."""
    offered = signature.arguments
    for name in signature.needs:
        if name not in offered and name not in columns:
            near = difflib.get_close_matches(name, [*offered, *columns], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(
                f"{noun} {spelled} asks for the argument {name!r}{hint}; available are "
                f"{', '.join(offered)}, the dataset's columns ({', '.join(sorted(columns))}) "
                "and what the config gives as fixed `kwargs`"
            )
