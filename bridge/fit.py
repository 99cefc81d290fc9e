"""Whether a model fits a parallel layout: asked before anything starts."""

import re
from collections.abc import Iterator

from bridge.rules import MegatronSpec
from configs.errors import ConfigError
from configs.schema import LayoutConfig, TrainerConfig


def check_layout(spec: MegatronSpec, layout: LayoutConfig, *, training: bool = True) -> None:
    """Raises ConfigError when the model cannot be spread like this, listing all that is wrong.

    `training`: also what is only wrong for gradients.
    """
    wrong = [*_attention(spec, layout), *_mlps(spec, layout), *_experts(spec, layout)]
    wrong += _pipeline(spec, layout)
    if layout.sequence_parallel and layout.tensor_model_parallel_size == 1:
        wrong.append("sequence_parallel needs tensor_model_parallel_size of 2 or more")
    if training:
        wrong += _gradients(spec, layout)
        wrong += _deepstack(spec, layout)
    if wrong:
        raise ConfigError("the model does not fit the parallel layout: " + "; ".join(wrong))


def moe_pattern(spec: MegatronSpec) -> list[bool]:
    """For every decoder layer, whether it has experts."""
    if not spec.num_experts:
        return [False] * spec.num_layers
    every = spec.transformer.get("moe_layer_freq", 1)
    if isinstance(every, int):
        return [layer % every == 0 for layer in range(spec.num_layers)]
    return [bool(experts) for experts in every]


def pipeline_stages(layout: str) -> list[str]:
    """The stages of a `pipeline_model_parallel_layout`, a letter for each layer.

    The notation is Megatron's (PipelineParallelLayerLayout): stages between `|`, `x*n` and `(...)*n` repeat,
    commas mean nothing.
    """
    text = layout.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
    return text.split("|")


def virtual_stages(layout: LayoutConfig) -> int | None:
    """Chunks of layers on each pipeline rank; None without the interleaved schedule."""
    if layout.virtual_pipeline_model_parallel_size or not layout.pipeline_model_parallel_layout:
        return layout.virtual_pipeline_model_parallel_size
    stages = len(pipeline_stages(layout.pipeline_model_parallel_layout))
    chunks = stages // layout.pipeline_model_parallel_size
    return chunks if chunks > 1 else None


def _divides(option: str, size: int, count: int, what: str) -> Iterator[str]:
    if count % size:
        yield f"{option} {size} does not divide the model's {count} {what}"


def _attention(spec: MegatronSpec, layout: LayoutConfig) -> Iterator[str]:
    shape, option, size = spec.transformer, "tensor_model_parallel_size", layout.tensor_model_parallel_size
    heads = shape["num_attention_heads"]
    yield from _divides(option, size, heads, "attention heads")
    if shape.get("multi_latent_attention"):
        return
    groups = spec.num_query_groups
    if size <= groups:
        yield from _divides(option, size, groups, "query groups (key-value heads)")
        return
    if size % groups:
        yield f"{option} {size} is not a multiple of the model's {groups} query groups (key-value heads)"
    rows = (heads + 2 * groups) * spec.head_dim
    yield from _divides(option, size, rows, "rows of query, key and value")


def _mlps(spec: MegatronSpec, layout: LayoutConfig) -> Iterator[str]:
    shape, option, size = spec.transformer, "tensor_model_parallel_size", layout.tensor_model_parallel_size
    if not all(moe_pattern(spec)):
        yield from _divides(option, size, shape["ffn_hidden_size"], "feed-forward size")
    shared = shape.get("moe_shared_expert_intermediate_size")
    if shared:
        yield from _divides(option, size, shared, "feed-forward size of shared experts")
    if spec.mtp_layers:
        yield from _divides(option, size, shape["hidden_size"], "hidden size (multi-token prediction)")


def _experts(spec: MegatronSpec, layout: LayoutConfig) -> Iterator[str]:
    size, parts = layout.expert_model_parallel_size, layout.expert_tensor_size
    ranks = layout.tensor_model_parallel_size * layout.context_parallel_size * layout.data_parallel_size
    if ranks % (size * parts):
        yield (
            f"expert_model_parallel_size {size} times expert_tensor_parallel_size {parts} does not divide the "
            f"{ranks} tensor-, context- and data-parallel ranks"
        )
    if not spec.num_experts:
        if size > 1:
            yield f"expert_model_parallel_size {size} is for models with experts; this one has none"
        return
    yield from _divides("expert_model_parallel_size", size, spec.num_experts, "experts")
    width = spec.transformer.get("moe_ffn_hidden_size") or spec.transformer["ffn_hidden_size"]
    yield from _divides("expert_tensor_parallel_size", parts, width, "feed-forward size of an expert")
    if parts > 1 and spec.transformer["add_bias_linear"]:
        yield (
            f"expert_tensor_parallel_size {parts}: Megatron does not split experts that have biases; set "
            "expert_tensor_parallel_size to 1"
        )


def _deepstack(spec: MegatronSpec, layout: LayoutConfig) -> Iterator[str]:
    """Features of the vision tower are at hand on the first pipeline stage, and while it runs, not later."""
    needed = spec.vision.deepstack if spec.vision is not None else 0
    first = first_chunk_layers(spec, layout)
    if first < needed:
        yield (
            f"the first pipeline stage has {first} layers, but the first {needed} take in features of the vision "
            "tower (deepstack) and have to be there; give it more layers"
        )
    if needed and isinstance(layout, TrainerConfig) and layout.recompute_granularity == "full":
        yield "recompute_granularity full is not possible for layers that take in features of the vision tower"


def first_chunk_layers(spec: MegatronSpec, layout: LayoutConfig) -> int:
    """Decoder layers of the first chunk of the first pipeline stage, under a layout that fits."""
    size, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    if layout.pipeline_model_parallel_layout:
        return pipeline_stages(layout.pipeline_model_parallel_layout)[0].count("t")
    if layout.num_layers_in_first_pipeline_stage:
        return layout.num_layers_in_first_pipeline_stage // chunks
    last = layout.num_layers_in_last_pipeline_stage
    if last and size > 1:
        return (spec.num_layers - last) // (size - 1) // chunks
    return spec.num_layers // (size * chunks)


def _gradients(spec: MegatronSpec, layout: LayoutConfig) -> Iterator[str]:
    if layout.tensor_model_parallel_size == 1 or layout.sequence_parallel:
        return
    if spec.num_experts:
        yield "training experts with tensor_model_parallel_size above 1 needs sequence_parallel"
    elif spec.transformer.get("multi_latent_attention"):
        yield "training latent attention with tensor_model_parallel_size above 1 needs sequence_parallel"


def _pipeline(spec: MegatronSpec, layout: LayoutConfig) -> Iterator[str]:
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    size, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    if size == 1 and (first or last or chunks):
        yield "virtual and uneven pipeline stages need pipeline_model_parallel_size of 2 or more"
    elif layout.pipeline_model_parallel_layout:
        if first or last:
            yield "pipeline_model_parallel_layout excludes num_layers_in_first/last_pipeline_stage"
        yield from _explicit(spec, layout, layout.pipeline_model_parallel_layout)
    elif first or last:
        yield from _uneven(spec, layout)
    else:
        option = "pipeline_model_parallel_size"
        if chunks:
            option += " times virtual_pipeline_model_parallel_size"
        yield from _divides(option, size * (chunks or 1), spec.num_layers, "layers")


def _uneven(spec: MegatronSpec, layout: LayoutConfig) -> Iterator[str]:
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    chunks = layout.virtual_pipeline_model_parallel_size or 1
    rest = spec.num_layers - (first or 0) - (last or 0)
    middle = layout.pipeline_model_parallel_size - bool(first) - bool(last)
    for option, count in (("first", first), ("last", last)):
        if count and count % chunks:
            yield (
                f"virtual_pipeline_model_parallel_size {chunks} does not divide "
                f"num_layers_in_{option}_pipeline_stage {count}"
            )
    if rest < 0 or bool(rest) != bool(middle) or (middle and rest % (middle * chunks)):
        yield (
            f"the {rest} layers between the first and last pipeline stage do not spread evenly over "
            f"{middle * chunks} stages"
        )


def _explicit(spec: MegatronSpec, layout: LayoutConfig, text: str) -> Iterator[str]:
    name, stages = f"pipeline_model_parallel_layout {text!r}", pipeline_stages(text)
    size, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    letters = "".join(stages)
    if len(stages) % size or (chunks and len(stages) != size * chunks):
        yield f"{name} has {len(stages)} stages, which is not what {size} pipeline ranks need"
    elif not all("".join(stages[rank::size]) for rank in range(size)):
        yield f"{name} leaves a pipeline rank without anything"
    if not re.fullmatch("Et*m*L", letters):
        yield f"{name} has to be one E, then all t, then all m, then one L"
    elif letters.count("t") != spec.num_layers:
        yield f"{name} has {letters.count('t')} layers t, the model {spec.num_layers}"
    elif letters.count("m") not in (0, stages[-1].count("m")) or letters.count("m") > spec.mtp_layers:
        yield f"{name}: the model's {spec.mtp_layers} layers m go with the last stage"
