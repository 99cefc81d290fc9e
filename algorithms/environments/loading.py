"""From `environment:` in a config to what is called after each turn: found and checked."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from algorithms.rewards.loading import RewardSource, load_code, read_source
from algorithms.rewards.signature import Signature, check_arguments, read_signature
from configs.environment import ENVIRONMENT, EnvironmentConfig
from configs.errors import ConfigError
from configs.rewards import RewardConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """A loaded environment: what it is called, what is called, and how.

    `made` is the class of an object for each episode, with `init` the signature of its constructor, both None for
    a function. `function` is called after each turn, of a class with the object as its first argument. `kwargs`
    are given in every call of a function, and to the constructor of a class. `path` is the user's file.
    """

    name: str
    function: Callable[..., object]
    signature: Signature
    made: Callable[..., object] | None
    init: Signature | None
    kwargs: Mapping[str, Any]
    path: str | None
    sha256: str | None
    source: RewardSource

    def describe(self, config: EnvironmentConfig) -> str:
        """One line: name, how it is called, how many turns, what a failed call is."""
        made = "" if self.init is None else f"an object {self.init.describe()}, "
        return (
            f"environment: {self.name}, {made}{self.signature.describe()}, at most {config.max_turns} turns, "
            f"{config.timeout_s:g} s a call, on_error {config.on_error}"
        )

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises ConfigError when it asks for what neither a call nor the dataset's `columns` have."""
        for signature in (self.signature, self.init):
            if signature is not None:
                check_arguments(signature, self.source.config.spelled, columns, noun=ENVIRONMENT)


def read_environment(config: EnvironmentConfig) -> RewardSource:
    """The source of the environment that `config` names, which pickles; imports nothing. Raises ConfigError."""
    asked = RewardConfig(
        function=config.function,
        timeout_s=config.timeout_s,
        max_concurrency=config.max_concurrency,
        kwargs=config.kwargs,
    )
    return read_source(asked, noun=ENVIRONMENT)


def load_environment(config: EnvironmentConfig) -> Environment:
    """The environment that `config` names, on this machine. Raises ConfigError saying what is wrong."""
    return build_environment(read_environment(config))


def build_environment(source: RewardSource) -> Environment:
    """Import what `source` holds, and check how it is to be called. Raises ConfigError."""
    found, path, sha256 = load_code(source)
    kwargs, spelled = source.config.kwargs, source.config.spelled
    if not callable(found):
        raise ConfigError(f"{source.title}: {source.function} is no function and no class but {found!r}")
    function, made, init, fixed = found, None, None, list(kwargs)
    if inspect.isclass(found):
        step: object = getattr(found, "step", None)
        if not inspect.isfunction(step):
            raise ConfigError(
                f"{source.title}: the class {source.function} has no method `step`; give it "
                "`step(self, completion)`, or name a function"
            )
        made = cast(Callable[..., object], found)
        init = read_signature(made, kwargs, spelled, style="episode", noun=ENVIRONMENT)
        # The object itself, whatever it is called.
        function, fixed = cast(Callable[..., object], step), list(inspect.signature(step).parameters)[:1]
    signature = read_signature(function, fixed, spelled, style="turn", noun=ENVIRONMENT)
    return Environment(
        name=source.name,
        function=function,
        signature=signature,
        made=made,
        init=init,
        kwargs=kwargs,
        path=path,
        sha256=sha256,
        source=source,
    )
