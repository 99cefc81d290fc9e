"""Blocks of a completion, and the reward for JSON that follows a schema."""

import functools
import importlib
import json
from collections.abc import Sequence
from typing import Any


def last_block(text: str, languages: Sequence[str] = ()) -> str | None:
    """The last fenced block of a Markdown text, of these languages or of none given; None without one.

    A block that is not closed does not count.
    """
    found: str | None = None
    lines: list[str] | None = None
    wanted = False
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if lines is None and bare.startswith("```"):
            language = bare.strip("`").strip().lower()
            lines, wanted = [], not languages or language in ("", *languages)
        elif lines is not None and bare.startswith("```") and not bare.strip("`"):
            found = "".join(lines) if wanted else found
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def json_schema(completion: str, schema: dict[str, Any] | bool | str) -> float:
    """1 if the completion's last fenced block, or without one all of it, is JSON that fits `schema`, else 0.

    `schema` is the column's value, or its text. References to other documents are not fetched. Raises ValueError
    if it is no schema.
    """
    text = schema if isinstance(schema, str) else json.dumps(schema)
    validator = _validator(text)
    block = last_block(completion)
    try:
        value = json.loads(completion if block is None else block, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    unresolvable: Any = importlib.import_module("referencing.exceptions").Unresolvable
    try:
        return float(validator.is_valid(value))
    except RecursionError:
        return 0.0
    except unresolvable as error:
        raise ValueError(f"json_schema: the column `schema` refers to what is not in it: {error}") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@functools.lru_cache(maxsize=256)
def _validator(text: str) -> Any:
    library: Any = importlib.import_module("jsonschema")
    registry: Any = importlib.import_module("referencing").Registry()
    schema = json.loads(text)
    kind = library.validators.validator_for(schema, default=library.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except library.SchemaError as error:
        raise ValueError(f"json_schema: the column `schema` is no schema: {error.message}") from None
    return kind(schema, registry=registry)
