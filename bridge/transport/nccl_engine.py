"""The NCCL transport of a vLLM worker on a GPU. Written against vLLM 0.32; never run on one by this project."""

import torch

from bridge.transport.base import Group
from bridge.transport.nccl import connect
from bridge.transport.nccl_device import CudaDevice
from bridge.transport.receiver import SyncInitInfo, SyncReceiver, SyncUpdateInfo


class NcclWeightTransferEngine(SyncReceiver):
    """Receives in the worker's GPU memory."""

    def _connect(self, info: SyncInitInfo, rank: int) -> Group:
        device = CudaDevice(self.device)
        return connect(info.host, info.port, rank, info.world_size, info.timeout_s, info.peers, device=device)

    def receive_weights(self, update_info: SyncUpdateInfo) -> None:
        """Receive, check and load all buckets; see SyncReceiver."""
        self._loading = torch.cuda.current_stream(self.device)
        super().receive_weights(update_info)

    def _receive_bucket(self, group: Group, nbytes: int) -> torch.Tensor:
        # The memory was perhaps that of an earlier bucket: what still reads it is queued on the stream that loads.
        with torch.cuda.stream(self._loading):
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            group.broadcast(buffer, 0)
            self._note.arrived()
        return buffer
