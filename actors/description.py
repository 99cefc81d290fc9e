"""What `bascule plan` says of a run."""

from collections.abc import Sequence

from actors.distill import describe_lessons
from actors.placement import describe as describe_bundles
from actors.run import Prepared
from actors.teacher import describe_teacher
from algorithms.formula import doubts, loss_line


def _trained_lines(prepared: Prepared) -> list[str]:
    adapter, freeze = prepared.sources.adapter, prepared.config.trainer.freeze
    if adapter is None:
        return [f"trained: all parameters but {', '.join(freeze)}"] if freeze else []
    start = "new" if adapter.is_new else f"from {adapter.mcore or adapter.directory}"
    return [f"trained: LoRA adapters of {len(adapter.modules)} modules, rank {adapter.config.r}, {start}"]


def _dropout(prepared: Prepared) -> float:
    adapter = prepared.sources.adapter
    return 0.0 if adapter is None else adapter.config.lora_dropout


def describe(prepared: Prepared) -> Sequence[str]:
    """What the run would start and where, line by line."""
    config = prepared.config
    trainer, source = config.trainer, prepared.sources.model
    lines = [
        f"model: {source.mcore or source.directory} ({prepared.spec.num_layers} layers, "
        f"{prepared.num_parameters / 1e6:.1f} M parameters), device {prepared.device}",
        *_trained_lines(prepared),
        f"trainer: {trainer.world_size} ranks = tensor {trainer.tensor_model_parallel_size} x pipeline "
        f"{trainer.pipeline_model_parallel_size} x context {trainer.context_parallel_size} x data "
        f"{trainer.data_parallel_size}",
    ]
    loss = [
        f"loss: {loss_line(config)}",
        *(f"doubtful: {doubt}" for doubt in doubts(config, lora_dropout=_dropout(prepared))),
    ]
    if config.algorithm == "grpo":
        settings = config.grpo
        lines += [
            f"data: {len(prepared.prompts)} prompts, {len(prepared.held_out)} held out",
            f"step: {settings.prompts_per_step} prompts x {settings.num_generations} completions, "
            f"{settings.optimizer_steps} optimizer step(s)",
            *loss,
            *([describe_teacher(config, prepared.teacher)] if config.has_teacher else []),
            *(reward.describe() for reward in prepared.rewards),
            *([] if prepared.environment is None else [prepared.environment.describe(config.environment)]),
        ]
    elif prepared.lessons is not None:
        lines += [
            describe_teacher(config, prepared.teacher),
            *describe_lessons(config, prepared.lessons),
            *loss,
        ]
    else:
        held_out = prepared.held_out_samples
        data = prepared.samples.describe() if prepared.stream is None else "streamed"
        lines += [
            f"data: {data}, {config.sft.batch_size} per step, {config.max_steps} steps",
            *([f"held out: {held_out.describe()}"] if held_out.kept else []),
            *loss,
        ]
    return [*lines, "actors, reserved together in one placement group:", describe_bundles(prepared.bundles)]
