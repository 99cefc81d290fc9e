"""Options of rewards: what is called, and what happens when a call fails."""

from typing import Literal, Self

from pydantic import Field, JsonValue, model_validator

from configs.section import Section
from configs.web import Url, VariableName

OnError = Literal["fail", "none", "zero", "drop_sample", "drop_group"]


class RewardConfig(Section):
    """One reward: a function, a server, or a reward model."""

    function: str | None = Field(default=None, min_length=1)
    """`file.py:name`, `package.module:name`, or the name of a built-in."""
    url: Url | None = None
    """A server that is sent JSON for each prompt's completions and answers with their rewards."""
    api_key_env: VariableName | None = None
    """Environment variable of the reward workers with the key that the server wants (`Authorization: Bearer`)."""
    model: str | None = Field(default=None, min_length=1)
    """Directory of a sequence-classification model with one output, scored by transformers on CPU."""
    name: str | None = Field(default=None, pattern=r"^[\w.\-]+$")
    """What it is called in metrics; by default the function's name, `url` or `model`."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor in the sum of rewards."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Longest one call may take."""
    on_error: OnError = "fail"
    """What a call that raises, hangs or gives no number counts as, after the first ones: the end of the run, no
    value, zero, or a completion or a whole group that is not trained on."""
    on_timeout: OnError | None = None
    """The same for a call that did not end in time, the first ones included; by default as on_error, and zero for
    the built-ins that compute what a model wrote, `math_boxed` and `cosine`, which a power tower never ends."""
    max_concurrency: int = Field(default=32, ge=1)
    """Calls of an async function, or requests to a server, at one time in one worker."""
    completions_as: Literal["auto", "text", "messages"] = "auto"
    """What `completions` of a batch function are: texts, or lists of one message. By default what the function's
    annotation says, else messages for rows that are conversations, as in TRL, and texts for a class."""
    kwargs: dict[str, JsonValue] = Field(default={})
    """Fixed keyword arguments; of a class, those of its constructor."""

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        given = [name for name in ("function", "url", "model") if self.spelled_as(name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"a reward has one of function, url and model; this one has {found}")
        if self.kwargs and self.function is None:
            raise ValueError(f"kwargs: are arguments of a function; a {given[0]} takes none")
        if self.api_key_env is not None and self.url is None:
            raise ValueError(f"api_key_env: is of a url; a {given[0]} has none")
        return self

    def spelled_as(self, kind: str) -> str | None:
        """What is given as `function`, `url` or `model`."""
        return {"function": self.function, "url": self.url, "model": self.model}[kind]

    @property
    def when_late(self) -> OnError:
        """What a call that did not end in time counts as."""
        if self.on_timeout is not None:
            return self.on_timeout
        return "zero" if self.function in ("math_boxed", "cosine") else self.on_error

    @property
    def spelled(self) -> str:
        """The function, address or directory, as it was written."""
        found = self.function or self.url or self.model
        assert found is not None, "checked above"
        return found


class RewardWorkersConfig(Section):
    """The processes in which rewards are computed, and when their failures end the run."""

    num_workers: int = Field(default=2, ge=1)
    """Workers; each runs one call of a plain function at a time, and many of async ones."""
    loud_calls: int = Field(default=8, ge=0)
    """The first calls of each reward end the run when they fail, whatever `on_error` says."""
    max_error_ratio: float = Field(default=0.2, ge=0, le=1)
    """The run ends when more than this share of a reward's last `error_window` calls failed."""
    error_window: int = Field(default=200, ge=1)
    """Calls that this share is over; it is looked at once there have been as many."""
    max_recoveries: int = Field(default=3, ge=0)
    """How often in a run a lost worker is replaced before the run ends with an error."""
