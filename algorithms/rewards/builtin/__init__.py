"""Built-in reward functions. A user's own look the same: arguments are filled in by name."""

import importlib
from collections.abc import Callable

from algorithms.rewards.builtin.matching import exact_match, format_match, regex, think_format
from algorithms.rewards.builtin.mathematics import math_boxed, numeric
from algorithms.rewards.builtin.programs import code_tests
from algorithms.rewards.builtin.structure import json_schema
from algorithms.rewards.builtin.tasks import reasoning_gym
from algorithms.rewards.builtin.text import cosine, length, repetition, soft_overlong

_FUNCTIONS: tuple[Callable[..., object], ...] = (
    exact_match,
    numeric,
    math_boxed,
    regex,
    format_match,
    think_format,
    length,
    soft_overlong,
    repetition,
    cosine,
    json_schema,
    code_tests,
    reasoning_gym,
)


def functions() -> dict[str, Callable[..., object]]:
    """The built-in rewards by name."""
    return {function.__name__: function for function in _FUNCTIONS}


def preload(name: str) -> None:
    """Import what the built-in `name` needs and make its first call: seconds that no call's timeout covers.

    Names of functions that are quick from the start, or not built in, are fine.
    """
    if name == "reasoning_gym":
        importlib.import_module("reasoning_gym")
    elif name in ("math_boxed", "cosine"):
        math_boxed("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}")
    elif name == "json_schema":
        json_schema("1", {})
