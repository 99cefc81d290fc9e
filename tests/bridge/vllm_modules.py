"""Our modules that import vLLM, for tests that start no engine."""

import importlib
import warnings
from typing import Any


def import_quietly(name: str) -> Any:
    """The module, without the warnings of what vLLM imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
