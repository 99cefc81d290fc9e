"""From `rewards:` in a config to callables: found, checked, and in a form that travels to other machines."""

import difflib
import hashlib
import importlib
import inspect
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from algorithms.rewards import builtin
from algorithms.rewards.model import RewardModel
from algorithms.rewards.remote import RewardServer
from algorithms.rewards.signature import Signature, read_signature
from configs.errors import ConfigError
from configs.rewards import RewardConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSource:
    """A reward, or another `noun`, as text, so that a machine without the file can load it; pickles.

    `path` is the file as the config names it, and `text` its content; both are None for a module's function,
    a built-in, a server and a model. `folder` is importable while the function is loaded.
    """

    config: RewardConfig
    name: str
    function: str
    module: str | None = None
    path: str | None = None
    text: str | None = None
    folder: str | None = None
    noun: str = "reward"

    @property
    def title(self) -> str:
        """What to call it in messages."""
        return f"{self.noun} {self.config.spelled}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """A loaded reward: what it is called, how it is called, and where it came from.

    `kwargs` are given in every call. `path` and `sha256` (hex, of the file) are None where there is no file.
    `of_class` says that the function is an object of a class the config named.
    """

    name: str
    function: Callable[..., object]
    signature: Signature
    kwargs: Mapping[str, Any]
    config: RewardConfig
    path: str | None
    sha256: str | None
    of_class: bool = False

    @property
    def weight(self) -> float:
        """Its factor in the sum of rewards."""
        return self.config.weight

    def describe(self) -> str:
        """One line: name, weight, how it is called, what a failed call counts as."""
        config = self.config
        return (
            f"reward: {self.name}, weight {self.weight:g}, {self.signature.describe()}, at most "
            f"{config.timeout_s:g} s, on_error {config.on_error}"
        )


def load_reward(config: RewardConfig) -> Reward:
    """The reward that `config` names, on this machine. Raises ConfigError saying what is wrong."""
    return build_reward(read_source(config))


def load_rewards(configs: Sequence[RewardConfig]) -> tuple[Reward, ...]:
    """All functions, under distinct names: a second `accuracy` is `accuracy_2`."""
    return tuple(build_reward(source) for source in read_sources(configs))


def read_sources(configs: Sequence[RewardConfig]) -> tuple[RewardSource, ...]:
    """Sources of all functions, under distinct names."""
    sources: list[RewardSource] = []
    taken: set[str] = set()
    for config in configs:
        base = name = config.name or _default_name(config)
        count = 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        sources.append(read_source(config, name))
    return tuple(sources)


def read_source(config: RewardConfig, name: str | None = None, *, noun: str = "reward") -> RewardSource:
    """The source of one function; reads its file, imports nothing. Raises ConfigError."""
    name = name or config.name or _default_name(config, noun)
    if config.function is None:
        return RewardSource(config=config, name=name, function=name, noun=noun)
    place, function = _split(config.function, noun)
    source = RewardSource(config=config, name=name, function=function, noun=noun)
    if place is None:
        return source
    if not place.endswith(".py"):
        return replace(source, module=place, folder=str(Path.cwd()))
    path = Path(place)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{source.title}: {place} cannot be read: {reason} (the path starts from the current folder)"
        ) from None
    folder = str(path.resolve().parent)
    return replace(source, path=place, text=text, folder=folder)


def build_reward(source: RewardSource) -> Reward:
    """Import what `source` holds and check the function's signature and fixed kwargs. Raises ConfigError.

    Of a class an object is made, with the fixed kwargs; it is called with none.
    """
    config = source.config
    kwargs: Mapping[str, Any] = config.kwargs
    found, path, sha256 = load_code(source)
    if not callable(found):
        raise ConfigError(f"reward {config.spelled}: {source.function} is not a function but {found!r}")
    of_class = inspect.isclass(found)
    if of_class:
        found, kwargs = _make_object(found, source, path), {}
    return Reward(
        name=source.name,
        function=found,
        signature=read_signature(found, kwargs, config.spelled),
        kwargs=kwargs,
        config=config,
        path=path,
        sha256=sha256,
        of_class=of_class,
    )


def load_code(source: RewardSource) -> tuple[object, str | None, str | None]:
    """The function or class, its file and the file's hash. Raises ConfigError."""
    config = source.config
    if config.url is not None:
        return RewardServer(config.url, config.api_key_env), None, None
    if config.model is not None:
        return RewardModel(config.model), None, None
    if source.text is not None:
        sha256 = hashlib.sha256(source.text.encode()).hexdigest()
        return _find(_import_text(source), source), source.path, sha256
    if source.module is not None:
        module = _import_module(source)
        file: str | None = vars(module).get("__file__")
        path = file if file and file.endswith(".py") else None
        sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
        return _find(module, source), path, sha256
    return _find_builtin(source), None, None


def _make_object(
    made: Callable[..., object], source: RewardSource, path: str | None
) -> Callable[..., object]:
    """An object of the class; ms-swift's take the trainer's arguments as `args`, which there are none of."""
    kwargs: dict[str, Any] = dict(source.config.kwargs)
    parameters = inspect.signature(made).parameters
    if "args" in parameters and parameters["args"].kind is not inspect.Parameter.VAR_POSITIONAL:
        kwargs.setdefault("args", None)
    try:
        thing = made(**kwargs)
    except (Exception, SystemExit) as error:
        raise _failure(source, "cannot be made", error, path) from error
    if not callable(thing):
        raise ConfigError(
            f"reward {source.config.spelled}: {source.function} is a class whose objects cannot be called; give "
            "it `__call__(self, completions, **columns)`"
        )
    return thing


def preload(reward: Reward) -> None:
    """What would count as time of the first call: weights of a model, libraries of a built-in."""
    if isinstance(reward.function, RewardModel):
        reward.function.load()
    elif reward.config.function is not None:
        builtin.preload(reward.config.function)


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


def _default_name(config: RewardConfig, noun: str = "reward") -> str:
    if config.function is not None:
        return _split(config.function, noun)[1]
    return "url" if config.url is not None else "model"


def _split(spelled: str, noun: str) -> tuple[str | None, str]:
    """File or module, None for a built-in, and the function's name."""
    place, colon, function = spelled.rpartition(":")
    if colon and place and function:
        return place, function
    if colon or spelled.endswith(".py"):
        raise ConfigError(f"{noun} {spelled}: write `file.py:name` or `package.module:name`")
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
        raise _failure(source, "cannot be imported", error, source.path) from error
    return module


def _import_module(source: RewardSource) -> ModuleType:
    assert source.module is not None
    try:
        with _importable(source.folder):
            return importlib.import_module(source.module)
    except (Exception, SystemExit) as error:
        raise _failure(source, "cannot be imported", error, None) from error


def _failure(source: RewardSource, what: str, error: BaseException, path: str | None) -> ConfigError:
    place = error_line(error, path)
    return ConfigError(f"{source.title} {what}: {type(error).__name__}: {error} ({place})")


def _find(module: ModuleType, source: RewardSource) -> object:
    names = vars(module)
    if source.function in names:
        return names[source.function]
    own = [
        name
        for name, value in names.items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    raise ConfigError(f"{source.title}: no function {source.function}{_others(source, own)}")


def _find_builtin(source: RewardSource) -> object:
    known = builtin.functions() if source.noun == "reward" else {}
    if source.function not in known:
        raise ConfigError(
            f"{source.noun} {source.function} is not built in{_others(source, known)}; a function of your own is "
            "`file.py:name` or `package.module:name`"
        )
    return known[source.function]


def _others(source: RewardSource, names: Collection[str]) -> str:
    near = difflib.get_close_matches(source.function, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{hint} (there is: {', '.join(sorted(names)) or 'none'})"
