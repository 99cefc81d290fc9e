"""What a process must find before it does anything: one source of code, one device, its environment."""

import importlib
from pathlib import Path

from configs.errors import BasculeError, ConfigError

PACKAGES = ("actors", "bridge", "algorithms", "configs")


def check_one_source() -> Path:
    """The folder that holds all four packages. Raises BasculeError when they come from different places.

    An older wheel in an image can shadow part of a submitted working directory; half of each would run.
    """
    folders = {name: _folder(name) for name in PACKAGES}
    if len(set(folders.values())) > 1:
        found = ", ".join(f"{name} from {folder}" for name, folder in folders.items())
        raise BasculeError(f"the project's packages come from different places: {found}")
    return folders["configs"]


def _folder(package: str) -> Path:
    file = importlib.import_module(package).__file__
    if file is None:
        raise BasculeError(f"package {package} is not this project's: it has no __init__.py")
    return Path(file).resolve().parent.parent


def threads_of(cpus: float) -> str:
    """OMP_NUM_THREADS of a process for which so many CPUs are reserved: as many threads, at least one."""
    return str(max(1, int(cpus)))


def resolve_device(device: str, *, elsewhere: bool = False) -> str:
    """`cpu` or `cuda`; `auto` is cuda where torch finds one. Raises ConfigError for cuda without one.

    What is asked for is taken as it is when it is `elsewhere`: on the nodes of a cluster, of which the one that
    a run is driven from may have no GPU.
    """
    import torch

    if device != "auto" and elsewhere:
        return device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no GPU; set it to cpu or auto")
    return device
