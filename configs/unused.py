"""Options outside of an algorithm's own section that no other algorithm uses."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.schema import RunConfig


def check_algorithms_own(config: "RunConfig") -> None:
    """Raises ValueError naming the option that another algorithm than the run's would use."""
    model = config.model
    # The algorithm's own section is not looked at: one file may serve several commands.
    given: tuple[tuple[str, str, object], ...] = (
        ("grpo", "model.ref_model", model.ref_model),
        ("grpo", "model.mcore_ref_model", model.mcore_ref_model),
        ("grpo", "tuner.ref_adapters", config.tuner.ref_adapters),
        ("grpo", "environment.function", config.environment.function),
        ("sft", "sft.num_train_epochs", config.sft.num_train_epochs),
        ("sft", "data.streaming", config.data.streaming or None),
    )
    for algorithm, name, value in given:
        if value is not None and config.algorithm != algorithm:
            instead = "; the run ends after max_steps" if name == "sft.num_train_epochs" else ""
            raise ValueError(
                f"{name}: is for {algorithm}, {config.algorithm} has no use for it{instead}; leave it out"
            )
