"""What a run saves, and how it goes on after it was cut off."""

from typing import Annotated, Literal

from pydantic import Field

from configs.section import Section
from configs.sizes import ShardSize


class CheckpointConfig(Section):
    """What a run saves."""

    save_steps: int = Field(default=0, ge=0)
    """Save `checkpoint-STEP` every this many steps, besides `checkpoint` at the end; 0 for only that."""
    save_safetensors: bool = True
    """Save Hugging Face safetensors; false saves a Megatron torch_dist checkpoint instead."""
    no_save_optim: bool = False
    """Leave optimizer and schedule out of torch_dist checkpoints."""
    max_shard_size: ShardSize = "5GB"
    """Largest safetensors file, as in transformers: 5GB, 200MB, 1GiB."""
    resume: str = Field(default="auto", min_length=1)
    """auto: go on after the newest complete state in the output directory, if a run there was cut off; never; or
    the directory of one of its states. See docs/reliability.md."""
    resume_steps: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Write a state to resume from every this many steps; 0 for none. auto: after the first step, then as often as
    takes a twentieth of the run's time at most; what auto wrote is removed when the run has finished."""
    resume_keep: int = Field(default=2, ge=1)
    """How many of the latest states are kept. Each takes as much room as weights and optimizer do."""
    resume_keep_every: int = Field(default=0, ge=0)
    """Write a state at each multiple of this many steps as well, and keep it for good; 0 for none."""
    resume_keep_best: bool = False
    """Write a state when an evaluation is the best so far as well, and keep it until there is a better one."""

    @property
    def keeps_states(self) -> bool:
        """Whether states are written at all, besides at an early end."""
        return self.resume_steps != 0 or self.resume_keep_every > 0 or self.resume_keep_best
