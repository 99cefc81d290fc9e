"""Options of an environment: what answers the model between its turns."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, JsonValue

from configs.section import Section

if TYPE_CHECKING:
    from configs.schema import RunConfig

ENVIRONMENT = "environment"
"""What the rewards that an environment gives are called among the rewards of a run."""


class EnvironmentConfig(Section):
    """What answers the model between its turns, see docs/environments.md; by default nothing does."""

    function: str | None = Field(default=None, min_length=1)
    """`file.py:name` or `package.module:name` of a function or a class with `step`, called after each turn."""
    max_turns: int = Field(default=4, ge=1)
    """Turns of the model in one episode, at most."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Longest one call may take."""
    max_observation_tokens: int = Field(default=256, ge=1)
    """Longer observations are cut. What the chat template puts around an observation is not counted."""
    role: Literal["tool", "user"] = "tool"
    """Who says an observation that does not tell itself, in the chat template's terms."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of the environment's own rewards in the sum of rewards."""
    on_error: Literal["fail", "end"] = "fail"
    """What a call that raises, hangs or gives nonsense is: the end of the run, or of the episode."""
    num_processes: int = Field(default=2, ge=1)
    """Processes; each runs one call of a plain function at a time, and many of async ones."""
    max_concurrency: int = Field(default=32, ge=1)
    """Calls of an async function at one time in one process."""
    kwargs: dict[str, JsonValue] = Field(default={})
    """Fixed keyword arguments; of a class, those of its constructor."""


def check_environment(config: "RunConfig") -> None:
    """Raises ValueError naming an option of an environment that is not there."""
    if config.environment.function is None:
        default = EnvironmentConfig()
        for name in EnvironmentConfig.model_fields:
            if getattr(config.environment, name) != getattr(default, name):
                raise ValueError(f"environment.{name}: is not used without environment.function")
