"""What our engines add to vLLM's worker class, through its argument `worker_extension_cls`."""

import os


class WorkerExtension:
    """Methods of every worker, for `collective_rpc`."""

    def process_id(self) -> int:
        """The process in which this worker runs; with one worker that is vLLM's core."""
        return os.getpid()
