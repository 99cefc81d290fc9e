"""A config as command-line words, for commands that are run elsewhere."""

import json
from collections.abc import Iterator
from typing import cast

from pydantic import JsonValue

from configs.options import list_options
from configs.schema import RunConfig


def as_words(config: RunConfig) -> list[str]:
    """`--section.key=value` for everything that is not a default, without the algorithm.

    `load_config(None, words, config.algorithm)` gives an equal config.
    """
    set_values = config.model_dump(mode="json", exclude_defaults=True)
    set_values.pop("algorithm", None)
    leaves = {option.path for option in list_options(RunConfig)}
    return [f"--{'.'.join(place)}={_text(value)}" for place, value in _values((), set_values, leaves)]


def _values(
    place: tuple[str, ...], value: JsonValue, leaves: set[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], JsonValue]]:
    if tuple("N" if part.isdigit() else part for part in place) in leaves:
        yield place, value
        return
    parts = value.items() if isinstance(value, dict) else enumerate(cast(list[JsonValue], value))
    for name, each in parts:
        yield from _values((*place, str(name)), each, leaves)


def _text(value: JsonValue) -> str:
    """As a shell's user would write it; quoted where it would be read as something else."""
    if not isinstance(value, str):
        return json.dumps(value)
    plain = value not in ("", "null", "~") and value[0] not in "[{'\"" and "\n" not in value
    return value if plain else json.dumps(value)
