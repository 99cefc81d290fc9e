"""States to resume from, as directories: RUN/resume/step-N, complete when it has that name. No actors here."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from algorithms.progress import Progress
from bridge.partial_directory import partial_of
from configs.errors import BasculeError, ConfigError, naming
from configs.schema import RunConfig

FOLDER = "resume"
MANIFEST = "manifest.json"
RESULT = "result.json"
_FORMAT = 2
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a state holds besides the files of the trainer ranks. It is written last."""

    progress: Progress
    config: Mapping[str, Any]
    """The resolved config, as JSON has it."""
    config_sha256: str
    streams: Mapping[str, Mapping[str, Any]]
    """Of each stream of data its position, and a digest of the data."""
    files: Mapping[str, int]
    """Bytes of each file of records at that moment."""
    links: Mapping[str, Any]
    """What CheckpointLinks remembers."""
    swapped: bool
    """Whether rewards had been replaced by `bascule reward reload`."""
    rewards: Sequence[Mapping[str, Any]] | None = None
    """The rewards in use, with the text of their files and its hash, where they had been replaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A complete state."""

    directory: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """After which step it was written."""
        return self.manifest.progress.step


def name_of(step: int) -> str:
    """Of a state's directory."""
    return f"step-{step}"


def config_of(config: RunConfig) -> dict[str, Any]:
    """Every option with its value, as JSON has it."""
    return config.model_dump(mode="json")


def config_sha256(config: Mapping[str, Any]) -> str:
    """Digest of a config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json. Raises WriteError naming it."""
    path = directory / MANIFEST
    with naming(path):
        path.write_text(json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1) + "\n")


def read_state(directory: Path) -> State:
    """The state in this directory. Raises ConfigError naming what is wrong with its manifest."""
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise ConfigError(f"{path}: not of format {_FORMAT}; it was written by another version")
        manifest = Manifest(**{**content, "progress": Progress(**content["progress"])})
    except OSError as error:
        raise ConfigError(f"{directory} is no state to resume from: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged, remove {directory}: {error!r}") from None
    if config_sha256(manifest.config) != manifest.config_sha256:
        raise ConfigError(f"{path}: its config is not the one that was saved; remove {directory}")
    return State(directory=directory, manifest=manifest)


def states(run: Path) -> list[Path]:
    """Directories of the complete states of a run, the newest last."""
    found = [
        (int(match[1]), path) for path in (run / FOLDER).glob("*") if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def find_state(config: RunConfig, run: Path) -> State | None:
    """What checkpoint.resume asks for; None when the run is to begin at the beginning.

    Raises ConfigError when it names no state of this run, or the newest one is damaged.
    """
    wanted = config.checkpoint.resume
    if wanted == "never":
        return None
    if wanted != "auto":
        path = Path(wanted).resolve()
        if path not in states(run):
            there = ", ".join(map(str, states(run))) or "there is none"
            raise ConfigError(f"checkpoint.resume: {path} is no complete state of {run} (states: {there})")
        return read_state(path)
    found = states(run)
    # A run that has finished is not one that was cut off.
    return read_state(found[-1]) if found and not has_finished(run) else None


def has_finished(run: Path) -> bool:
    """Whether the run in this directory came to its last step."""
    try:
        return json.loads((run / RESULT).read_text()).get("finished", True)
    except OSError:
        return False
    except ValueError:
        # It was cut off while it wrote that it had finished.
        return False


def step_of(state: Path) -> int:
    """After which step the state in this directory was written."""
    return int(state.name.removeprefix("step-"))


def forget(run: Path, keep: Callable[[Sequence[int]], Set[int]]) -> None:
    """Remove states, and what is incomplete; `keep` says of the steps of all of them which stay."""
    kept = keep([step_of(path) for path in states(run)])
    for path in (run / FOLDER).glob("step-*"):
        if not (_NAME.fullmatch(path.name) and step_of(path) in kept):
            # Under another name it is no state any more, however far the removal comes.
            gone = path.rename(partial_of(path)) if _NAME.fullmatch(path.name) else path
            shutil.rmtree(gone, ignore_errors=True)


def check_files(run: Path, files: Mapping[str, int]) -> None:
    """Raises BasculeError when a file of records is shorter than it was when the state was written."""
    for name, size in files.items():
        path = run / name
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise BasculeError(
                f"{path}: has {found} bytes, but had {size} when the state was saved; records of steps are "
                "lost. Put the file back, or start anew with --resume never --exist_ok"
            )


def truncate_files(run: Path, files: Mapping[str, int]) -> None:
    """Cut off what was recorded after the state was written."""
    for name, size in files.items():
        with (run / name).open("r+b") as file:
            file.truncate(size)
