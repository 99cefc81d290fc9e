"""The part of a model that sees which is of transformers' own modules: vision tower and aligner."""

import copy
import pkgutil
import re
from collections.abc import Collection
from contextlib import nullcontext
from typing import Literal

import torch

from bridge.rules import VisionSpec

Part = Literal["llm", "vit", "aligner"]

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


def part_of(vision: VisionSpec, parameter: str) -> Part:
    """Which part of the model a parameter (global name) belongs to."""
    if not parameter.startswith(TOWER):
        return "llm"
    return "aligner" if parameter.removeprefix(TOWER).startswith(vision.aligner) else "vit"


def modules_of(vision: VisionSpec, parts: Collection[Part]) -> str:
    """Paths of the Hugging Face modules in these parts of the model, as one regular expression."""
    tower = rf"(.*\.)?({'|'.join(vision.hf_modules)})\..*"
    aligner = rf"(.*\.)?({'|'.join(map(re.escape, vision.aligner))}).*"
    patterns: dict[Part, str] = {
        "llm": f"(?!{tower}).*",
        "vit": f"(?!{aligner}){tower}",
        "aligner": f"(?={aligner}){tower}",
    }
    return "|".join(patterns[part] for part in sorted(parts))


def tower_linears(vision: VisionSpec) -> frozenset[str]:
    """The tower's weights (global names) that belong to linear layers."""
    return frozenset(
        f"{TOWER}{name}.weight"
        for name, module in build_tower(vision, "meta").named_modules()
        if isinstance(module, torch.nn.Linear)
    )
