"""The part of a model that sees which is transformers' own module: vision tower and aligner."""

import copy
import pkgutil
from collections.abc import Iterator

import torch

from bridge.rules import VisionSpec

TOWER = "visual."
"""What comes before names of the tower's parameters in Megatron's model."""


def build_tower(vision: VisionSpec) -> torch.nn.Module:
    """The tower with its aligner, on torch's default device; weights are whatever transformers makes of them."""
    kind = pkgutil.resolve_name(vision.tower)
    # Checking a config writes into what it is made of.
    fields = copy.deepcopy(dict(vision.config))
    # With it also the name of its attention, which transformers sets as it sees fit.
    return kind._from_config(kind.config_class(**fields))


def is_aligner(vision: VisionSpec, parameter: str) -> bool:
    """Whether a parameter (global name) is the aligner's."""
    return parameter.removeprefix(TOWER).startswith(vision.aligner) and parameter.startswith(TOWER)


def parts_of(vision: VisionSpec, parameters: Iterator[str]) -> dict[str, str]:
    """Which part of the model each parameter (global name) is of: `llm`, `vit` or `aligner`."""
    return {
        name: ("aligner" if is_aligner(vision, name) else "vit") if name.startswith(TOWER) else "llm"
        for name in parameters
    }
