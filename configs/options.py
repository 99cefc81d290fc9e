"""The options of a schema: their names, their types, and the help text."""

import difflib
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo

from configs.errors import ConfigError
from configs.schema import RunConfig
from configs.web import without_passwords


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One leaf of a schema. `path` has "N" where a list section takes an index."""

    path: tuple[str, ...]
    annotation: Any
    field: FieldInfo

    @property
    def dotted(self) -> str:
        """`section.key`."""
        return ".".join(self.path)


def describe_options(schema: type[BaseModel] = RunConfig) -> str:
    """Help text of every option, grouped by section: `--section.key TYPE`, its text, its default."""
    groups: dict[tuple[str, ...], list[str]] = {(): [(schema.__doc__ or "").strip()]}
    for name, info in schema.model_fields.items():
        inner, _ = section_of(info.annotation)
        if inner is not None:
            groups[(name,)] = [f"{name}: {(inner.__doc__ or '').strip()}"]
    for option in list_options(schema):
        groups.setdefault(option.path[:1] if len(option.path) > 1 else (), []).append(_describe(option))
    return "\n\n".join("\n".join(lines) for lines in groups.values()) + "\n"


def list_options(schema: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[Option]:
    """All leaves of `schema`, in the order in which they are written there."""
    options: list[Option] = []
    for name, info in schema.model_fields.items():
        inner, many = section_of(info.annotation)
        path = (*prefix, name)
        if inner is None:
            options.append(Option(path=path, annotation=info.annotation, field=info))
        else:
            options.extend(list_options(inner, (*path, "N") if many else path))
    return options


def resolve_key(
    key: str, options: Sequence[Option], algorithm: str | None = None
) -> tuple[list[str | int], Option]:
    """The place that `section.key`, or a leaf name that is unique, stands for, and its option.

    With an `algorithm` a leaf name is not that of another algorithm's section, if there is any other. Raises
    ConfigError for an unknown key (with the nearest one) or an ambiguous leaf (with all of them).
    """
    parts = key.split(".")
    for option in options:
        if (place := match_place(parts, option.path, option)) is not None:
            return place, option
    found = [
        ([*option.path[:-1], *place], option)
        for option in options
        # What is in a section of a section is written out: `--num_engines` are the rollout's, not the teacher's.
        if "N" not in option.path
        and len(option.path) <= 2
        and (place := match_place(parts, option.path[-1:], option)) is not None
    ]
    if len(found) > 1 and algorithm is not None:
        others = set(algorithms(options)) - {algorithm}
        found = [each for each in found if each[1].path[0] not in others]
    # A name that entries of a list have too is not meant without its section, unless that is called the same.
    listed = [option for option in options if "N" in option.path and option.path[-1] == parts[0]]
    if found and found[0][1].path[0] == parts[0]:
        listed = []
    if len(found) == 1 and not listed:
        return found[0]
    if found:
        names = " or ".join(f"--{option.dotted}" for option in [*(option for _, option in found), *listed])
        raise ConfigError(f"command line: --{key} is ambiguous; write {names}")
    inside = [option.path[-1] for option in options if _starts_with(option.path, parts)]
    if inside:
        raise ConfigError(f"command line: --{key} is a section; give one of its keys: {', '.join(inside)}")
    raise ConfigError(f"command line: --{key} is not an option{nearest(parts, options, '--')}")


def algorithms(options: Sequence[Option]) -> tuple[str, ...]:
    """What a run's `algorithm` may be; each has a section of its name."""
    return next((get_args(option.annotation) for option in options if option.path == ("algorithm",)), ())


def _starts_with(path: tuple[str, ...], parts: Sequence[str]) -> bool:
    return len(parts) < len(path) and all(
        part == name or (name == "N" and part.isdigit()) for part, name in zip(parts, path, strict=False)
    )


def match_place(parts: Sequence[str], path: tuple[str, ...], option: Option) -> list[str | int] | None:
    place: list[str | int] = []
    if len(parts) < len(path):
        return None
    for part, name in zip(parts, path, strict=False):
        if name == "N" and part.isdigit():
            place.append(int(part))
        elif name != "N" and part == name:
            place.append(part)
        else:
            return None
    rest = list(parts[len(path) :])
    kind = get_origin(option.annotation)
    if kind is dict and rest:
        return [*place, ".".join(rest)]
    if kind is tuple and len(rest) == 1 and rest[0].isdigit():
        return [*place, int(rest[0])]
    return None if rest else place


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section class an annotation holds, if any, and whether it holds a list of them."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    if get_origin(annotation) is tuple and len(kinds) == 2 and kinds[1] is Ellipsis:
        return section_of(kinds[0])[0], True
    if get_origin(annotation) is not None and len(kinds) == 1:
        return section_of(kinds[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    return None, False


def option_at(loc: Sequence[str | int], options: Sequence[Option]) -> tuple[Option | None, str]:
    """The option of a pydantic location, and its dotted key without the tags of union members at the end."""
    parts = [str(part) for part in loc]
    for end in range(len(parts), 0, -1):
        for option in options:
            inside = end - len(option.path) <= 1
            if inside and match_place(parts[:end], option.path, option) is not None:
                return option, ".".join(parts[:end])
    return None, ".".join(parts)


def nearest(parts: Sequence[str], options: Sequence[Option], dashes: str) -> str:
    """`; did you mean X?` for the option or section that is most like `parts`, wherever it is."""
    names = {option.dotted for option in options} | {option.path[0] for option in options}
    wanted = ".".join("N" if part.isdigit() else part for part in parts)
    section, _, leaf = wanted.rpartition(".")

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, wanted, name).ratio()
        own_section, _, own_leaf = name.rpartition(".")
        last = difflib.SequenceMatcher(None, leaf, own_leaf).ratio()
        return max(whole, last) + (0.05 if section == own_section else 0.0)

    best = max(sorted(names), key=likeness)
    return f"; did you mean {dashes}{best}?" if likeness(best) > 0.65 else ""


def type_text(annotation: Any) -> str:
    names = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", NoneType: "null"}
    kinds = get_args(annotation)
    if annotation is JsonValue:
        return "VALUE"
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is Literal:
        return "|".join(str(kind) for kind in kinds)
    if get_origin(annotation) is dict:
        return f"{{NAME: {type_text(kinds[1])}}}"
    if get_origin(annotation) is tuple:
        return f"[{type_text(kinds[0])}, ...]"
    # What comes with a type in Annotated is no type itself.
    return "|".join(filter(None, map(type_text, kinds)))


def _describe(option: Option) -> str:
    info = option.field
    default = "" if info.is_required() else json.dumps(info.default, default=str).strip('"')
    note = "(required)" if info.is_required() else f"(default: {default})"
    text = textwrap.wrap(f"{info.description or ''} {note}", 100, break_on_hyphens=False)
    lines = [f"  --{option.dotted} {type_text(option.annotation)}", *(f"        {line}" for line in text)]
    return "\n".join(lines)


def show(value: Any) -> str:
    text = without_passwords(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
