"""Whether what a run samples and trains on fits into engines and micro-batches, before anything starts."""

from collections.abc import Sequence

from algorithms.data import Prompt, TrainSample
from bridge.rules import MegatronSpec
from configs.errors import ConfigError
from configs.schema import RunConfig


def check_prompts(prompts: Sequence[Prompt], config: RunConfig, spec: MegatronSpec) -> None:
    """Raises ConfigError naming a prompt that leaves no room for a completion in an engine."""
    limit = config.rollout.max_model_len or spec.max_sequence_length
    if prompts and limit > spec.max_sequence_length:
        raise ConfigError(
            f"rollout.max_model_len: {limit} exceeds the model's own {spec.max_sequence_length}"
        )
    longest = config.max_completion_length
    for prompt in prompts:
        if not 0 < prompt.tokens.size <= limit - longest:
            raise ConfigError(
                f"data: prompt {prompt.id} has {prompt.tokens.size} tokens; with max_completion_length {longest} "
                f"it must have 1 to {limit - longest}, since rollout.max_model_len is {limit}"
            )


def check_micro_batches(prompts: Sequence[Prompt], samples: Sequence[TrainSample], config: RunConfig) -> None:
    """Raises ConfigError unless a micro-batch holds the longest sample, and the longest prompt of `prompts` with
    the longest completion that may come. All of `samples` are packed: those to train on, and the held-out ones.
    """
    # The row may become longer than this, so that tensor-parallel ranks can share it; packing allows for that.
    budget = config.trainer.micro_batch_tokens
    if budget is None:
        return
    if config.data.streaming and config.sft.max_length > budget:
        raise ConfigError(
            f"trainer.micro_batch_tokens: {budget} is less than sft.max_length {config.sft.max_length}, which a "
            "streamed sample may have; raise it or lower that"
        )
    longest = max((sample.tokens.size for sample in samples), default=0)
    if longest > budget:
        raise ConfigError(
            f"trainer.micro_batch_tokens: {budget} is less than the longest sample, which has {longest} tokens; "
            f"set it to {longest} or more, or make sft.max_length {budget} with sft.truncation truncate or drop"
        )
    prompt = max(prompts, key=lambda prompt: prompt.tokens.size, default=None)
    needed = 0 if prompt is None else prompt.tokens.size + config.max_completion_length
    if prompt is not None and needed > budget:
        raise ConfigError(
            f"trainer.micro_batch_tokens: {budget} is less than a sample may have: the longest prompt, "
            f"{prompt.id}, has {prompt.tokens.size} tokens, and max_completion_length is "
            f"{config.max_completion_length}; set it to {needed} or more"
        )
