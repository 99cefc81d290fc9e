"""Options of what a run writes for people to look at."""

from pydantic import Field

from configs.section import Section


class RecordConfig(Section):
    """What a run writes besides its metrics; see docs/metrics.md."""

    token_steps: int = Field(default=10, ge=0)
    """Write tokens of completions every this many steps, and the first; 0 never. grpo only. Such a step asks the
    trainers for log-probabilities once or twice more."""
