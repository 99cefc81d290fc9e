"""Imports of torch, Megatron and vLLM take seconds in every process; the garbage collector is a sixth of them."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While it lasts nothing is collected, and what is there at its end never will be looked at again.

    For imports, which make hundreds of thousands of objects that all stay.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
