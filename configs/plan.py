"""What `bascule plan` is told when it is about a model on ranks, not about a run."""

from math import prod
from typing import Any, Literal, Self, cast

from pydantic import Field, model_validator

from configs.schema import LayoutConfig
from configs.section import Section


class PlanConfig(Section):
    """A model on any number of ranks, on paper: config.json is all that is read."""

    model: str = Field(min_length=1)
    """Directory with config.json; weights are not needed."""
    world: int | None = Field(default=None, ge=1)
    """Ranks in total; the data-parallel size follows from it."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; by default config.json's."""
    bucket_size_mb: float = Field(default=64.0, gt=0)
    """Tensors travel to engines in buckets of at most this size."""
    link_gb_s: float = Field(default=25.0, gt=0)
    """GB per second into the bridge's node and out of it, for the estimate of a sync (25: 200 Gbit/s)."""
    load_gb_s: float = Field(default=5.0, gt=0)
    """GB per second that one engine worker hashes and loads, for the same."""
    engine_tensor_parallel_size: int = Field(default=1, ge=1)
    """Workers that share the weights of one engine, for the same."""
    layout: LayoutConfig = LayoutConfig()

    @model_validator(mode="before")
    @classmethod
    def _world_sets_replicas(cls, values: Any) -> Any:
        # Nothing has been checked yet: what is no size is left to be refused by name.
        given = cast("dict[str, Any]", values)
        layout: dict[str, Any] = dict(given.get("layout", {}))
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        sizes: list[Any] = [given.get("world"), *(layout.get(name, 1) for name in names)]
        if "data_parallel_size" not in layout and all(isinstance(size, int) and size > 0 for size in sizes):
            world, *others = sizes
            layout["data_parallel_size"] = max(1, world // prod(others))
        return {**given, "layout": layout}

    @model_validator(mode="after")
    def _world_is_the_product(self) -> Self:
        if self.world is not None and self.world != self.layout.world_size:
            raise ValueError(
                f"world: {self.world} is not tensor x pipeline x context x data = "
                f"{self.layout.tensor_model_parallel_size} x {self.layout.pipeline_model_parallel_size} x "
                f"{self.layout.context_parallel_size} x {self.layout.data_parallel_size}"
            )
        return self
