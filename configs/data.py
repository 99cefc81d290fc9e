"""Options of where prompts and samples come from."""

from typing import Literal

from pydantic import Field

from configs.section import Names, Section


class DataConfig(Section):
    """Where prompts and samples come from."""

    dataset: Names = Field(min_length=1)
    """Files, directories of `Dataset.save_to_disk`, `reasoning_gym:NAME`; with `#500` as many rows of it."""
    eval_dataset: Names = ()
    """Held-out rows, in the same forms."""
    split_dataset_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of each dataset that is held out instead of trained on, where there is no eval_dataset."""
    dataset_size: int = Field(default=1000, ge=1)
    """Rows to draw when the dataset is generated (`reasoning_gym:`)."""
    eval_size: int = Field(default=100, ge=1)
    """Held-out rows at most, of eval_dataset or generated."""
    dataset_kwargs: dict[str, str | int | float | bool] = Field(default={})
    """Arguments of a generated dataset, for example the difficulty of a reasoning-gym task."""
    system_prompt: str | None = None
    """Put before a row that has no system message."""
    shuffle: bool = True
    """Draw prompts in a new random order in every epoch."""
    streaming: bool = False
    """Read rows and turn them into tokens (sft) as they are needed, not all before the first step."""
    shuffle_buffer_size: int = Field(default=1000, ge=1)
    """With streaming: rows among which the next one is drawn."""
    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longer prompts, in tokens, are an error that names the row."""
    loss_on: Literal["all_assistant", "last_assistant"] = "all_assistant"
    """Which turns of a conversation sft trains on: all of the assistant's, or the last one."""


def check_data(data: DataConfig) -> None:
    """Raises ValueError naming the option that contradicts another."""
    if data.split_dataset_ratio and data.eval_dataset:
        raise ValueError(
            "data.split_dataset_ratio: is not used with data.eval_dataset; leave one of them out"
        )
    if data.streaming and data.split_dataset_ratio:
        raise ValueError(
            "data.split_dataset_ratio: needs all rows, which data.streaming does not read; give data.eval_dataset"
        )
