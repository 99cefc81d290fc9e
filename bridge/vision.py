"""The part of a model that sees which is of transformers' own modules: vision tower and aligner."""

import copy
import pkgutil
from contextlib import nullcontext
from typing import Literal

import torch

from bridge.rules import VisionSpec

TOWER = "visual."
"""What comes before names of the tower's parameters in Megatron's model."""


def build_tower(vision: VisionSpec, device: str | None = None) -> torch.nn.Module:
    """The tower with its aligner, on `device` or torch's default one; weights are whatever transformers makes of
    them."""
    # Before the device is set: its module makes tensors as it is imported, which have to be real.
    kind = pkgutil.resolve_name(vision.tower)
    # Checking a config writes into what it is made of.
    fields = copy.deepcopy(dict(vision.config))
    # With it also the name of its attention, which transformers sets as it sees fit.
    with nullcontext() if device is None else torch.device(device):
        return kind._from_config(kind.config_class(**fields))


def part_of(vision: VisionSpec, parameter: str) -> Literal["llm", "vit", "aligner"]:
    """Which part of the model a parameter (global name) belongs to."""
    if not parameter.startswith(TOWER):
        return "llm"
    return "aligner" if parameter.removeprefix(TOWER).startswith(vision.aligner) else "vit"


def of_tower(vision: VisionSpec) -> str:
    """The tower's Hugging Face modules, as a regular expression."""
    return rf"(.*\.)?({'|'.join(vision.hf_modules)})\..*"
