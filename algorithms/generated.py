"""Rows that reasoning-gym makes."""

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from configs.errors import ConfigError

GENERATED = "reasoning_gym:"
"""What the name of a generated dataset starts with."""
# reasoning-gym seeds row i with seed + i: seeds that are close to each other share rows.
EVAL_SEED_DISTANCE = 1 << 30


def generate(
    name: str, size: int, options: Mapping[str, str | int | float | bool], seed: int
) -> Iterator[dict[str, Any]]:
    """`size` entries of a task, each with its question as `prompt`. Raises ConfigError naming the option."""
    # Imported here, because it takes seconds and most datasets do not need it.
    factory: Any = importlib.import_module("reasoning_gym.factory")
    tasks: dict[str, Any] = factory.DATASETS
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"data.dataset: reasoning-gym has no task {name!r}{hint}")
    fields = {each.name for each in dataclasses.fields(tasks[name][1])} - {"seed", "size"}
    for key in options:
        if key not in fields:
            near = ", ".join(difflib.get_close_matches(key, fields, n=3, cutoff=0.4) or sorted(fields))
            raise ConfigError(
                f"data.dataset_kwargs.{key}: {name} takes no such argument; nearest: {near} "
                "(seed and size come from `seed`, data.dataset_size and data.eval_size)"
            )
    try:
        entries: Iterable[dict[str, Any]] = factory.create_dataset(name, size=size, seed=seed, **options)
        # The options are a column, because some tasks score an answer by them.
        for entry in entries:
            yield {"prompt": entry["question"], **entry, "dataset_kwargs": dict(options)}
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"data.dataset_kwargs: reasoning-gym's {name} refuses {dict(options)}: {error}"
        ) from error
