"""From `rewards:` in a config to callables: found, checked, and in a form that travels to other machines."""

import difflib
import hashlib
import importlib
import inspect
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType

from algorithms.rewards.builtin import functions
from configs.errors import ConfigError
from configs.schema import RewardConfig

# What a function may ask for besides the dataset's columns; a column of the same name is hidden.
CALL_ARGUMENTS = ("completion", "prompt", "messages", "tokens", "finish")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSource:
    """A reward function as text, so that a machine without the file can load it; pickles.

    `path` is the file as the config names it, and `text` its content; both are None for a module's function
    or a built-in. `folder` is importable while the function is loaded.
    """

    config: RewardConfig
    name: str
    function: str
    module: str | None = None
    path: str | None = None
    text: str | None = None
    folder: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """A loaded reward function: what it is called, what it needs, and where it came from.

    `needs` are arguments without a default, `takes` those with one, fixed kwargs in neither; `takes_all` says
    that it has `**kwargs`. `path` and `sha256` (hex, of the file) are None where there is no file.
    """

    name: str
    weight: float
    function: Callable[..., object]
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    takes_all: bool
    config: RewardConfig
    path: str | None
    sha256: str | None


def load_reward(config: RewardConfig) -> Reward:
    """The function that `config` names, on this machine. Raises ConfigError saying what is wrong."""
    return build_reward(read_source(config))


def load_rewards(configs: Sequence[RewardConfig]) -> tuple[Reward, ...]:
    """All functions, under distinct names: a second `accuracy` is `accuracy_2`."""
    return tuple(build_reward(source) for source in read_sources(configs))


def read_sources(configs: Sequence[RewardConfig]) -> tuple[RewardSource, ...]:
    """Sources of all functions, under distinct names."""
    sources: list[RewardSource] = []
    taken: set[str] = set()
    for config in configs:
        base = name = _split(config.function)[1]
        count = 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        sources.append(read_source(config, name))
    return tuple(sources)


def read_source(config: RewardConfig, name: str | None = None) -> RewardSource:
    """The source of one function; reads its file, imports nothing. Raises ConfigError."""
    place, function = _split(config.function)
    name = name or function
    if place is None:
        return RewardSource(config=config, name=name, function=function)
    if not place.endswith(".py"):
        return RewardSource(config=config, name=name, function=function, module=place, folder=str(Path.cwd()))
    path = Path(place)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"reward {config.function}: {place} cannot be read: {reason} "
            "(the path starts from the current folder)"
        ) from None
    folder = str(path.resolve().parent)
    return RewardSource(config=config, name=name, function=function, path=place, text=text, folder=folder)


def build_reward(source: RewardSource) -> Reward:
    """Import what `source` holds and check the function's signature and fixed kwargs. Raises ConfigError."""
    spelled = source.config.function
    if source.text is not None:
        module = _import_text(source)
        sha256 = hashlib.sha256(source.text.encode()).hexdigest()
        function, path = _find(module, source), source.path
    elif source.module is not None:
        module = _import_module(source)
        file: str | None = vars(module).get("__file__")
        path = file if file and file.endswith(".py") else None
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
        function = _find(module, source)
    else:
        function, path, sha256 = _find_builtin(source), None, None
    if not callable(function):
        raise ConfigError(f"reward {spelled}: {source.function} is not a function but {function!r}")
    if inspect.isclass(function):
        raise ConfigError(f"reward {spelled}: {source.function} is a class; name a function")
    needs, takes, takes_all = _arguments(function, source)
    return Reward(
        name=source.name,
        weight=source.config.weight,
        function=function,
        needs=needs,
        takes=takes,
        takes_all=takes_all,
        config=source.config,
        path=path,
        sha256=sha256,
    )


def check_arguments(reward: Reward, columns: Collection[str]) -> None:
    """Raises ConfigError when the function asks for what neither a call nor the dataset's `columns` have."""
    for name in reward.needs:
        if name not in CALL_ARGUMENTS and name not in columns:
            near = difflib.get_close_matches(name, [*CALL_ARGUMENTS, *columns], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(
                f"reward {reward.config.function} asks for the argument {name!r}{hint}; available are "
                f"{', '.join(CALL_ARGUMENTS)}, the dataset's columns ({', '.join(sorted(columns))}) "
                "and what the config gives as fixed `kwargs`"
            )


def error_line(error: BaseException, path: str | None) -> str:
    """`FILE line N: CODE` of the deepest frame in `path`, or of the deepest frame of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename} line {error.lineno}: {(error.text or '').strip()}"
    frames = _frames(error.__traceback__)
    own = [frame for frame in frames if frame.filename == path] or frames
    if not own:
        return path or "no line known"
    return f"{own[-1].filename} line {own[-1].lineno}: {own[-1].line}"


def _frames(trace: TracebackType | None) -> list[traceback.FrameSummary]:
    internal = (__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
    return [frame for frame in traceback.extract_tb(trace) if frame.filename not in internal]


def _split(spelled: str) -> tuple[str | None, str]:
    """File or module, None for a built-in, and the function's name."""
    place, colon, function = spelled.rpartition(":")
    if colon and place and function:
        return place, function
    if colon or spelled.endswith(".py"):
        raise ConfigError(f"reward {spelled}: write `file.py:name` or `package.module:name`")
    return None, spelled


@contextmanager
def _importable(folder: str | None) -> Generator[None]:
    if folder is not None:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        # The user's code may have changed the list meanwhile.
        if folder is not None and folder in sys.path:
            sys.path.remove(folder)


def _import_text(source: RewardSource) -> ModuleType:
    assert source.text is not None
    assert source.path is not None
    assert source.folder is not None
    digest = hashlib.sha256(f"{source.folder}/{source.path}\0{source.text}".encode()).hexdigest()
    name = f"bascule_reward_{Path(source.path).stem}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = os.path.join(source.folder, Path(source.path).name)  # noqa: PTH118
    # Tracebacks show the user's lines on machines that do not have the file.
    lines = source.text.splitlines(keepends=True)
    linecache.cache[source.path] = (len(source.text), None, lines, source.path)
    # Dataclasses and pickle look their module up by name.
    sys.modules[module.__name__] = module
    try:
        with _importable(source.folder):
            exec(compile(source.text, source.path, "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise _import_failure(source, error, source.path) from error
    return module


def _import_module(source: RewardSource) -> ModuleType:
    assert source.module is not None
    try:
        with _importable(source.folder):
            return importlib.import_module(source.module)
    except (Exception, SystemExit) as error:
        raise _import_failure(source, error, None) from error


def _import_failure(source: RewardSource, error: BaseException, path: str | None) -> ConfigError:
    place = error_line(error, path)
    return ConfigError(
        f"reward {source.config.function} cannot be imported: {type(error).__name__}: {error} ({place})"
    )


def _find(module: ModuleType, source: RewardSource) -> object:
    names = vars(module)
    if source.function in names:
        return names[source.function]
    own = [
        name
        for name, value in names.items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    raise ConfigError(f"reward {source.config.function}: no function {source.function}{_others(source, own)}")


def _find_builtin(source: RewardSource) -> object:
    known = functions()
    if source.function not in known:
        raise ConfigError(
            f"reward {source.function} is not built in{_others(source, known)}; a function of your own is "
            "`file.py:name` or `package.module:name`"
        )
    if source.function == "reasoning_gym":
        # Takes seconds, which would count as time of the first call.
        importlib.import_module("reasoning_gym")
    return known[source.function]


def _others(source: RewardSource, names: Collection[str]) -> str:
    near = difflib.get_close_matches(source.function, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{hint} (there is: {', '.join(sorted(names)) or 'none'})"


def _arguments(
    function: Callable[..., object], source: RewardSource
) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    spelled, fixed = source.config.function, source.config.kwargs
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ConfigError(f"reward {spelled}: its arguments cannot be read; wrap it in a function") from None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    for each in parameters:
        if each.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ConfigError(
                f"reward {spelled}: {each.name!r} is positional-only; arguments are given by name"
            )
    names = [each.name for each in parameters if each.kind in by_name]
    for name in fixed:
        if name not in names and not takes_all:
            raise ConfigError(
                f"reward {spelled}: `kwargs` gives {name!r}, which the function does not take; it takes "
                f"{', '.join(names) or 'nothing'}"
            )
    free = [each for each in parameters if each.kind in by_name and each.name not in fixed]
    needs = tuple(each.name for each in free if each.default is inspect.Parameter.empty)
    takes = tuple(each.name for each in free if each.default is not inspect.Parameter.empty)
    return needs, takes, takes_all
