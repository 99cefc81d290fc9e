"""A model against what a run wants of it, from its files alone."""

from dataclasses import dataclass

from actors.engine_support import check_engines, check_not_quantized
from actors.model_source import Contents, ModelSource, read_contents
from bridge.families import read_hf_config, spec_of
from bridge.fit import check_layout
from bridge.parameters import check_tensors
from bridge.rules import Family, MegatronSpec
from configs.schema import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedModel:
    """A model that fits, and what was found out about it."""

    family: Family
    spec: MegatronSpec
    contents: Contents


def check_model(source: ModelSource, config: RunConfig, *, has_engines: bool) -> CheckedModel:
    """Config, layout, and the headers of the weights, against each other. Raises ConfigError."""
    family, spec = spec_of(source.directory)
    hf_config = read_hf_config(source.directory)
    if has_engines:
        check_engines(source.directory, hf_config, config.rollout.tensor_parallel_size)
    check_layout(spec, config.trainer)
    contents = read_contents(source)
    if has_engines:
        check_not_quantized(source, hf_config, contents)
    if contents.tensors is not None:
        # Layers for multi-token prediction are not trained.
        check_tensors(family, spec, contents.tensors, source.directory, mtp=False)
    return CheckedModel(family=family, spec=spec, contents=contents)
