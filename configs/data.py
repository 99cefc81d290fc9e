"""Options of where prompts and samples come from."""

from pydantic import Field

from configs.section import Section


class DataConfig(Section):
    """Where prompts come from."""

    dataset: str = Field(min_length=1)
    """A JSONL file with `prompt` or `messages`, or `reasoning_gym:NAME`."""
    eval_dataset: str | None = None
    """Held-out prompts, in the same forms."""
    dataset_size: int = Field(default=1000, ge=1)
    """Rows to draw when the dataset is generated (`reasoning_gym:`)."""
    eval_size: int = Field(default=100, ge=1)
    """Held-out rows at most."""
    dataset_kwargs: dict[str, str | int | float | bool] = Field(default={})
    """Arguments of a generated dataset, for example the difficulty of a reasoning-gym task."""
    system_prompt: str | None = None
    """Put before a row that has no system message."""
    shuffle: bool = True
    """Draw prompts in a new random order in every epoch."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longer prompts, in tokens, are an error that names the row."""
