"""What vLLM runs in each of its processes, through the entry point group `vllm.general_plugins`."""

import contextlib
import multiprocessing
import os
import threading

OWNED_ENGINE = "BASCULE_OWNED_ENGINE"
"""Environment variable, "1" in the processes of our own engines."""

IGNORED_ADAPTERS = ("kv_b_proj", "shared_expert_gate")
"""Last names of modules that vLLM 0.32 gives adapters and computes past: latent attention and the sum with the
shared expert hold the modules that were there before."""

SEEING = {
    "Qwen2VLForConditionalGeneration": "Qwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen25VL",
    "Qwen3VLForConditionalGeneration": "Qwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3VLMoe",
}
"""Models that see, as config.json names them, which our engines run: the classes of vllm_vision."""


def register() -> None:
    """Make the weight-transfer backends `gloo` and `cupy_nccl` known to vLLM. May be called again.

    In processes of our own engines (actors and `bascule infer`) it also ties each child to the life of its parent,
    lets none leave a semaphore behind, and repairs calls of several workers and, on CPU, the rotary embedding.
    Raises BasculeError there when vLLM is another version than the repairs were written for. An engine that
    someone else starts in this environment is left as it is.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for name, engine in (("gloo", "GlooWeightTransferEngine"), ("cupy_nccl", "NcclWeightTransferEngine")):
        module = f"bridge.transport.{name.removeprefix('cupy_')}_engine"
        # A name that is there already is the only ValueError.
        with contextlib.suppress(ValueError):
            WeightTransferEngineFactory.register_engine(name, module, engine)
    if os.environ.get(OWNED_ENGINE) == "1":
        exit_with_parent()
        leave_no_semaphore()
        _repair()


def _repair() -> None:
    from vllm.platforms import current_platform

    from bridge.transport.vllm_fixes import (
        hear_all_workers,
        keep_experts_with_adapters_elsewhere,
        require_written_for,
        rotate_heads_flat,
    )

    require_written_for()
    hear_all_workers()
    _register_models()
    if current_platform.is_cpu():
        rotate_heads_flat()
        keep_experts_with_adapters_elsewhere()


def _register_models() -> None:
    from vllm import ModelRegistry

    for architecture, name in SEEING.items():
        # By name: only an engine that has this model imports it.
        ModelRegistry.register_model(architecture, f"bridge.transport.vllm_vision:{name}")


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


def leave_no_semaphore() -> None:
    """Let progress bars of this process lock threads only.

    tqdm makes a lock for processes too, which in one that multiprocessing spawned is a named semaphore: a file in
    /dev/shm that stays when the process and its resource tracker are killed, which is how Ray ends engines.
    """
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
