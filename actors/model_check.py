"""A model against what a run wants of it, from its files alone."""

from dataclasses import dataclass, fields
from pathlib import Path

from actors.engine_support import check_engines, check_not_quantized
from actors.model_source import Contents, ModelSource, read_contents
from bridge.families import read_hf_config, spec_of
from bridge.fit import check_layout
from bridge.parameters import check_tensors
from bridge.rules import Family, MegatronSpec
from configs.errors import ConfigError
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
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        if getattr(config.trainer, name) > 0 and not spec.num_experts:
            raise ConfigError(f"trainer.{name}: {source.directory} has no experts; leave it at 0")
    contents = read_contents(source)
    if has_engines:
        check_not_quantized(source, hf_config, contents)
    if contents.tensors is not None:
        # Layers for multi-token prediction are not trained.
        check_tensors(family, spec, contents.tensors, source.directory, mtp=False)
    return CheckedModel(family=family, spec=spec, contents=contents)


def check_same_shape(reference: MegatronSpec, policy: MegatronSpec, directory: Path) -> None:
    """Raises ConfigError unless the reference in `directory` is the policy's model with other weights."""
    ours, theirs = (
        {**spec.transformer, **{each.name: getattr(spec, each.name) for each in fields(spec)}}
        for spec in (policy, reference)
    )
    # How long a text may be is no matter of weights, and layers for multi-token prediction are not trained.
    compared = (ours.keys() | theirs.keys()) - {"transformer", "max_sequence_length", "mtp_layers"}
    other = sorted(name for name in compared if ours.get(name) != theirs.get(name))
    if other:
        told = ", ".join(f"{name} ({theirs.get(name)}, not {ours.get(name)})" for name in other[:3])
        raise ConfigError(
            f"model.ref_model: {directory} is another model than the one that is trained: {told}; "
            "grpo.sync_ref_model moves its weights towards the policy's, so set that to false, or give a "
            "reference of the policy's shape"
        )
