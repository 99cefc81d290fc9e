"""What our engines add to vLLM's worker class, through its argument `worker_extension_cls`."""

import os
from typing import Any

from bridge.transport.lora_loading import activate


class WorkerExtension:
    """Methods of every worker, for `collective_rpc`."""

    model_runner: Any
    weight_transfer_engine: Any

    def process_id(self) -> int:
        """The process in which this worker runs; with one worker that is vLLM's core."""
        return os.getpid()

    def activate_adapter(self) -> None:
        """Let requests use the adapter of the last update, before the first one that changes nothing.

        It is not done in the update, because vLLM drops all adapters when that is finished.
        """
        activate(self.model_runner.get_model().lora_manager, self.weight_transfer_engine.take_adapter())
