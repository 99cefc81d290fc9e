"""What vLLM runs in each of its processes, through the entry point group `vllm.general_plugins`."""

import contextlib
import multiprocessing
import os
import threading

OWNED_ENGINE = "BASCULE_OWNED_ENGINE"
"""Environment variable, "1" in the processes of an engine actor."""


def register() -> None:
    """Make the weight-transfer backend `gloo` known to vLLM. May be called again.

    Inside an engine actor's processes it also ties each child to the life of its parent.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    # A name that is there already is the only ValueError.
    with contextlib.suppress(ValueError):
        WeightTransferEngineFactory.register_engine(
            "gloo", "bridge.transport.gloo_engine", "GlooWeightTransferEngine"
        )
    if os.environ.get(OWNED_ENGINE) == "1":
        exit_with_parent()


def exit_with_parent() -> None:
    """End this process when the process that started it through multiprocessing ends, even by SIGKILL.

    vLLM 0.32's engine core has no such tie: it outlives a killed parent and keeps its memory. Ray 2.60 was seen
    to clean up after a killed worker; this does not depend on it.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="exit-with-parent", daemon=True).start()
