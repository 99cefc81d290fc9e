"""How much of a model is trained."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from configs.section import Names, Section


class TunerConfig(Section):
    """What of the model is trained: all of it, or LoRA adapters beside it. Names are ms-swift's and PEFT's."""

    tuner_type: Literal["full", "lora"] = "full"
    """Train every parameter, or only adapters; a checkpoint is then a PEFT adapter."""
    lora_rank: int = Field(default=8, ge=1)
    """Rows of A and columns of B."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The adapter counts lora_alpha / lora_rank times."""
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share of an adapter's input that is dropped in training. By default 0.05 for sft (of an adapter to start
    from its own), and 0 for grpo and gkd, whose log-probabilities it would make random."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_rank) instead."""
    target_modules: Names = ("all-linear",)
    """Ends of Hugging Face module names, `q_proj,v_proj`, or `all-linear`: attention, MLPs and experts."""
    modules_to_save: Names = ()
    """Modules that are trained whole besides, and stored with the adapter."""
    adapters: Path | None = None
    """PEFT adapter to start from; rank, scale and modules are then its own."""
    mcore_adapter: Path | None = None
    """The same as a Megatron torch_dist checkpoint that this project has written."""
    ref_adapters: Path | None = None
    """PEFT adapter of the reference; by default the reference is the model without any."""
    merge_lora: bool = False
    """Write the merged model too: `checkpoint-merged`, or `checkpoint-STEP-merged`, beside the adapter."""

    def with_dropout(self, algorithm: str) -> "TunerConfig":
        """The same with the `lora_dropout` that stands for None; that stays where an adapter has its own."""
        if self.tuner_type == "full" or self.lora_dropout is not None:
            return self
        if algorithm != "sft":
            return self.model_copy(update={"lora_dropout": 0.0})
        has_own = self.adapters is not None or self.mcore_adapter is not None
        return self if has_own else self.model_copy(update={"lora_dropout": 0.05})


_OWN = ("lora_rank", "lora_alpha", "use_rslora", "target_modules", "modules_to_save")
"""What an adapter to start from decides itself."""


def check_tuner(tuner: TunerConfig) -> None:
    """Raises ValueError naming the option that contradicts another."""
    # Not what was typed but what differs from the default, so that a dump loads back.
    fields = TunerConfig.model_fields
    changed = [name for name, value in tuner if value != fields[name].default]
    if tuner.tuner_type == "full" and changed:
        raise ValueError(f"tuner.{changed[0]}: is not used while tuner.tuner_type is full; set it to lora")
    if tuner.adapters is not None and tuner.mcore_adapter is not None:
        raise ValueError("tuner.mcore_adapter: give it or tuner.adapters, not both")
    start = next((name for name in ("adapters", "mcore_adapter") if name in changed), None)
    clash = next((name for name in _OWN if name in changed), None)
    if start is not None and clash is not None:
        raise ValueError(f"tuner.{clash}: is the adapter's own with tuner.{start}; leave it out")
    if not tuner.target_modules:
        raise ValueError("tuner.target_modules: names no module")
    if "all-linear" in tuner.target_modules and len(tuner.target_modules) > 1:
        raise ValueError("tuner.target_modules: all-linear stands alone")
