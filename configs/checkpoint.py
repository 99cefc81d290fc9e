"""What a run saves, and how it goes on after it was cut off."""

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
    resume_steps: int = Field(default=0, ge=0)
    """Write a state to resume from every this many steps; the last two are kept. 0 for none."""


def check_resume(checkpoint: CheckpointConfig, *, max_lag: int = 0, with_adapters: bool = False) -> None:
    """Raises ValueError when a state would not hold all that the run goes on with."""
    if checkpoint.resume_steps and max_lag:
        raise ValueError(
            f"checkpoint.resume_steps: a state does not hold what is being sampled ahead, so it needs "
            f"grpo.max_lag 0, not {max_lag}; set one of them to 0"
        )
    if checkpoint.resume_steps and with_adapters:
        raise ValueError(
            "checkpoint.resume_steps: a run with adapters (tuner.tuner_type lora) cannot be resumed yet; set "
            "it to 0"
        )
