"""The gloo transport of a vLLM worker."""

from bridge.transport.base import Group
from bridge.transport.gloo import connect
from bridge.transport.receiver import SyncInitInfo, SyncReceiver


class GlooWeightTransferEngine(SyncReceiver):
    """Receives in host memory."""

    def _connect(self, info: SyncInitInfo, rank: int) -> Group:
        return connect(info.host, info.port, rank, info.world_size, info.timeout_s, info.peers)
