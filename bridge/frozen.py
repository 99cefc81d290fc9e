"""Which Megatron parameters are not trained, from patterns of Hugging Face names."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from bridge.megatron import EMBEDDING, OUTPUT_LAYER, possible_rules
from bridge.parameters import parameters_of
from bridge.plan import TensorInfo
from bridge.rules import Family, MegatronSpec
from bridge.vision import part_of
from configs.errors import ConfigError
from configs.vision import VisionConfig


def frozen_parameters(
    family: Family,
    spec: MegatronSpec,
    tensors: Mapping[str, TensorInfo] | None,
    patterns: Sequence[str],
) -> frozenset[str]:
    """Global names of the Megatron parameters whose Hugging Face tensors the patterns match.

    `tensors` are the checkpoint's, where it is known what they are. Raises ConfigError for a pattern that
    matches nothing, for a parameter that is made of several tensors of which some are matched, and when
    nothing is left to train.
    """
    if not patterns:
        return frozenset()
    names: dict[str, tuple[str, ...]] = {}
    for parameter in parameters_of(spec, mtp=False):
        # Expert biases of routers are no parameters: gradients never change them.
        if not parameter.endswith("router.expert_bias"):
            names[parameter] = possible_rules(family.matches(parameter, spec.num_layers), tensors)[0].hf_names
    found: set[str] = set()
    unused = set(patterns)
    for parameter, hf_names in names.items():
        hits = [[pattern for pattern in patterns if fnmatchcase(name, pattern)] for name in hf_names]
        unused.difference_update(pattern for hit in hits for pattern in hit)
        if all(hits):
            found.add(parameter)
        elif any(hits):
            matched = [name for name, hit in zip(hf_names, hits, strict=True) if hit]
            others = [name for name, hit in zip(hf_names, hits, strict=True) if not hit]
            raise ConfigError(
                f"trainer.freeze: {', '.join(matched)} is matched, {', '.join(others)} is not, and Megatron keeps "
                f"them in one parameter, {parameter}; match all of them or none"
            )
    if unused:
        raise ConfigError(_no_match(sorted(unused), spec, names))
    if len(found) == len(names):
        raise ConfigError("trainer.freeze: the patterns match every parameter, so nothing is left to train")
    if spec.tie_word_embeddings and EMBEDDING in found:
        # The last pipeline stage has a copy of its own.
        found.add(OUTPUT_LAYER)
    return frozenset(found)


def frozen_parts(spec: MegatronSpec, vision: VisionConfig) -> frozenset[str]:
    """Global names of the parameters of those parts of a model that sees which are not trained.

    Raises ConfigError for a model that is nothing but a language model, if that is not to be trained.
    """
    if spec.vision is None:
        if vision.freeze_llm:
            raise ConfigError("vision.freeze_llm: the model is nothing but a language model")
        return frozenset()
    found = {
        name for name in parameters_of(spec, mtp=False) if part_of(spec.vision, name) in vision.frozen_parts
    }
    if spec.tie_word_embeddings and EMBEDDING in found:
        found.add(OUTPUT_LAYER)
    return frozenset(found)


def _no_match(unused: Sequence[str], spec: MegatronSpec, names: Mapping[str, tuple[str, ...]]) -> str:
    hint = "; its head is its embedding" if spec.tie_word_embeddings else ""
    examples = [names[EMBEDDING][0], next(hf[0] for name, hf in names.items() if name != EMBEDDING)]
    return (
        f"trainer.freeze: no parameter of the model is called {' or '.join(unused)}; a pattern matches the whole "
        f"name, of which {' and '.join(examples)} are two{hint}"
    )
