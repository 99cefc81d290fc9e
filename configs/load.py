"""YAML files and command-line overrides become a checked config; every complaint says where it comes from."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import ConfigError
from configs.options import (
    Option,
    algorithms,
    list_options,
    nearest,
    option_at,
    resolve_key,
    section_of,
    show,
    type_text,
)
from configs.schema import RunConfig

S = TypeVar("S", bound=BaseModel)

# YAML 1.2 scalars. PyYAML's own rules are YAML 1.1's: `1e-6` would be a string and `no` a boolean.
_SCALARS = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first_characters in _SCALARS:
        for character in first_characters:
            table.setdefault(character, []).append((tag, re.compile(f"^(?:{pattern})$")))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()


class _Dumper(yaml.SafeDumper):
    # The same rules decide which strings need quotes, so that a dump loads back as it was.
    yaml_implicit_resolvers = _resolvers()


@dataclass(kw_only=True, slots=True)
class _Sources:
    """Where each value came from, for messages."""

    file: Path | None
    lines: dict[str, int] = field(default_factory=dict[str, int])
    typed: set[str] = field(default_factory=set[str])

    def where(self, dotted: str) -> str:
        parents = [dotted[:end] for end, char in enumerate(dotted) if char == "."] + [dotted]
        if any(parent in self.typed for parent in parents):
            return f"command line: --{dotted}"
        if self.file is None or dotted not in self.lines:
            return dotted if self.file is None else f"{self.file}: {dotted}"
        return f"{self.file}:{self.lines[dotted]}: {dotted}"


def load_config(path: Path | None, overrides: Sequence[str], algorithm: str) -> RunConfig:
    """The checked config of one run: defaults, then the file, then the overrides.

    `overrides` are command-line words such as `--trainer.lr 1e-5`. Raises ConfigError, with one line for
    each thing that is wrong.
    """
    return load_settings(RunConfig, path, overrides, algorithm=algorithm)


def load_settings(
    schema: type[S], path: Path | None, overrides: Sequence[str], *, algorithm: str | None = None
) -> S:
    """Like load_config, for any schema. `algorithm`, if given, is set, and a file for another is refused."""
    options = list_options(schema)
    sources = _Sources(file=path)
    tree: dict[str, Any] = {}
    if path is not None:
        tree, sources.lines = _read_file(path)
    for name, info in schema.model_fields.items():
        inner, many = section_of(info.annotation)
        # A section left out, or with all of its keys commented out, is an empty one.
        if inner is not None and not many and (info.is_required() or name in tree):
            tree[name] = {} if tree.get(name) is None else tree[name]
    running = tree.get("algorithm") if algorithm is None else algorithm
    for key, text in _split_words(overrides):
        place, option = resolve_key(key, options, running)
        _assign(tree, place, _parse_value(key, text, option, place), key)
        sources.typed.add(".".join(map(str, place)))
    if algorithm is not None:
        _check_algorithm(tree, algorithm, options, sources)
        tree["algorithm"] = algorithm
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, options, sources))) from None


def dump_config(config: BaseModel) -> str:
    """YAML of every option, defaults included; load_config turns it back into an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's mapping, and the line of each dotted key."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        lines = dict(_walk_lines(node, "", path)) if node is not None else {}
        tree: Any = cast(Any, loader).construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}{context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML text file: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested without end; an alias (*name) stands inside its anchor") from None
    except OSError as error:
        raise ConfigError(f"{path}: this config file cannot be read: {error.strerror}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}:1: a config file is a mapping of sections, this one is {show(tree)}")
    return cast(dict[str, Any], tree or {}), lines


def _walk_lines(node: yaml.Node, prefix: str, path: Path) -> Iterator[tuple[str, int]]:
    children: list[tuple[str, yaml.Node, int]] = []
    if isinstance(node, yaml.MappingNode):
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{path}:{key.start_mark.line + 1}: a key is a word, not a list or mapping")
        children = [(key.value, value, key.start_mark.line + 1) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(index), item, item.start_mark.line + 1) for index, item in enumerate(node.value)]
    seen: set[str] = set()
    for name, child, line in children:
        dotted = f"{prefix}{name}"
        if name in seen:
            raise ConfigError(f"{path}:{line}: {dotted} is given twice; remove one")
        seen.add(name)
        yield dotted, line
        yield from _walk_lines(child, f"{dotted}.", path)


def _split_words(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Pairs of key and text; the text is None for a `--flag` alone."""
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(
                f"command line: {word!r} belongs to no option; options are `--section.key value`"
            )
        position += 1
        key, equals, text = word[2:].partition("=")
        if equals:
            yield key, text
        elif position < len(words) and not words[position].startswith("--"):
            yield key, words[position]
            position += 1
        else:
            yield key, None


def _parse_value(key: str, text: str | None, option: Option, place: Sequence[str | int]) -> Any:
    kinds = get_args(option.annotation) or (option.annotation,)
    if text is None:
        if bool in kinds and len(place) == len(option.path):
            return True
        raise ConfigError(f"command line: --{key} needs a value, {type_text(option.annotation)}")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    kind = get_origin(option.annotation)
    plain = kind is not dict and any(str in (each, *get_args(each)) or each is Path for each in kinds)
    is_list = kind is tuple and len(place) == len(option.path) and text.startswith("[")
    if plain and not quoted and not is_list:
        # Text is taken as typed: `Think: then answer` is no mapping and `2026` is no number.
        return None if text in ("null", "~") and (NoneType in kinds or kind is tuple) else text
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(
            f"command line: --{key}: {text!r} is not valid YAML; wanted {type_text(option.annotation)}"
        ) from None


def _assign(tree: dict[str, Any], place: Sequence[str | int], value: Any, key: str) -> None:
    node: Any = tree
    for part, following in pairwise(place):
        if _slot(node, part, key) is None:
            node[part] = [] if isinstance(following, int) else {}
        node = node[part]
    _slot(node, place[-1], key)
    node[place[-1]] = value


def _slot(node: Any, part: str | int, key: str) -> Any:
    """What is at `part`, or None; a list grows by one place when `part` is its length."""
    if isinstance(part, str) and isinstance(node, dict):
        return cast(dict[str, Any], node).get(part)
    if not isinstance(part, int) or not isinstance(node, list):
        raise ConfigError(f"command line: --{key} does not fit the file, which has {show(node)} there")
    items = cast(list[Any], node)
    if part > len(items):
        raise ConfigError(f"command line: --{key}: there are {len(items)} items, so the next is {len(items)}")
    if part == len(items):
        items.append(None)
    return items[part]


def _check_algorithm(
    tree: Mapping[str, Any], algorithm: str, options: Sequence[Option], sources: _Sources
) -> None:
    given = tree.get("algorithm", algorithm)
    choices = algorithms(options)
    if given not in choices:
        raise ConfigError(f"{sources.where('algorithm')} is {show(given)}; it is one of {', '.join(choices)}")
    if given != algorithm:
        raise ConfigError(
            f"{sources.where('algorithm')} is {given}, so run `bascule {given}`, not `bascule {algorithm}`"
        )


def _explain(error: ValidationError, options: Sequence[Option], sources: _Sources) -> Iterator[str]:
    told: set[str] = set()
    for item in error.errors(include_url=False):
        option, dotted = option_at(item["loc"], options)
        if dotted in told and dotted:
            continue
        told.add(dotted)
        where, message = sources.where(dotted), item["msg"].replace("Input should be", "should be")
        if item["type"] == "extra_forbidden":
            yield f"{where} is not an option{nearest(dotted.split('.'), options, '')}"
        elif item["type"] == "missing":
            text = f" ({option.field.description})" if option and option.field.description else ""
            yield f"{where} is required{text}; give it in the config file or as --{dotted}"
        elif not dotted:
            yield (f"{sources.file}: " if sources.file else "") + message.removeprefix("Value error, ")
        elif option is not None and len(item["loc"]) > len(dotted.split(".")):
            yield f"{where} is {show(item['input'])}; should be {type_text(option.annotation)}"
        else:
            yield f"{where} is {show(item['input'])}; {message.removeprefix('Value error, ')}"
