"""What `bascule plan` is told when it is about a model on ranks, not about a run."""

from typing import Any, Literal, Self, cast

from pydantic import Field, model_validator

from configs.schema import LayoutConfig, Section


class PlanConfig(Section):
    """A model on any number of ranks, on paper: config.json is all that is read."""

    model: str = Field(min_length=1)
    """Directory with config.json; weights are not needed."""
    world: int | None = Field(default=None, ge=1)
    """Ranks in total; the data-parallel size follows from it."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; by default config.json's."""
    bucket_size_mb: float = Field(default=64.0, gt=0)
    """Tensors travel together in buckets of about this size."""
    layout: LayoutConfig = LayoutConfig()

    @model_validator(mode="before")
    @classmethod
    def _world_sets_replicas(cls, values: Any) -> Any:
        given = cast("dict[str, Any]", values)
        world = given.get("world")
        layout: dict[str, Any] = dict(given.get("layout") or {})
        if isinstance(world, int) and "data_parallel_size" not in layout:
            tensor = int(layout.get("tensor_model_parallel_size", 1))
            pipeline = int(layout.get("pipeline_model_parallel_size", 1))
            layout["data_parallel_size"] = max(1, world // (tensor * pipeline))
        return {**given, "layout": layout}

    @model_validator(mode="after")
    def _world_is_the_product(self) -> Self:
        if self.world is not None and self.world != self.layout.world_size:
            raise ValueError(
                f"world: {self.world} is not tensor x pipeline x data = "
                f"{self.layout.tensor_model_parallel_size} x {self.layout.pipeline_model_parallel_size} x "
                f"{self.layout.data_parallel_size}"
            )
        return self
