"""Options of what a run writes for people to look at, and where else it sends its numbers."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from configs.section import Section, split_names

Tracker = Literal["wandb", "mlflow"]


class RecordConfig(Section):
    """What a run writes besides its metrics, and who else gets these; see docs/metrics.md."""

    token_steps: int = Field(default=10, ge=0)
    """Write tokens of completions every this many steps, and the first; 0 never. grpo only. Such a step asks the
    trainers for log-probabilities once or twice more."""
    trace_steps: int = Field(default=20, ge=0)
    """Steps in trace.json, which shows in Perfetto what every process did when; then it is begun anew, and the one
    before is kept. 0 writes none."""
    report_to: tuple[Tracker, ...] = ()
    """Give all metrics to these as well: wandb, mlflow. They have to be installed, and find their servers by their
    own environment variables. TensorBoard's files are always written."""
    run_name: str | None = Field(default=None, min_length=1)
    """What `report_to` and Prometheus call the run; by default the last part of output_dir."""
    project: str = Field(default="bascule", min_length=1)
    """Project of W&B, experiment of MLflow."""
    prometheus: bool = True
    """Give metrics to Ray, whose nodes serve them to Prometheus. Only on a cluster that the run joins."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        """`wandb,mlflow` as well as a list; null and none for none."""
        return () if value == "none" else split_names(value)

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError(f"record.report_to: {', '.join(self.report_to)} names one twice")
        return self
