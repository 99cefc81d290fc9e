"""Options of supervised fine-tuning."""

from pydantic import Field

from configs.section import Section


class SFTConfig(Section):
    """Supervised fine-tuning on prompt/completion or messages rows."""

    batch_size: int = Field(default=64, ge=1)
    """Samples per optimizer step."""
    max_length: int = Field(default=1024, ge=2)
    """Longest sample in tokens; longer ones are an error that names the row."""
