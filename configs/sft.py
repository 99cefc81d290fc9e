"""Options of supervised fine-tuning."""

from typing import Literal

from pydantic import Field

from configs.section import Section


class SFTConfig(Section):
    """Supervised fine-tuning on conversations, prompt/completion or alpaca rows."""

    batch_size: int = Field(default=64, ge=1)
    """Samples per optimizer step."""
    num_train_epochs: float | None = Field(default=None, gt=0)
    """Times every sample is trained on, rounded up to whole steps; in place of max_steps."""
    max_length: int = Field(default=1024, ge=2)
    """Longest sample in tokens."""
    truncation: Literal["error", "truncate", "drop"] = "error"
    """A longer sample is an error that names the row, or loses its end, or is left out."""
