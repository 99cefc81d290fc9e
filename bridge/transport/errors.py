"""What goes wrong on the way. Without torch, so that processes that only hear of it start quickly."""

from configs.errors import BasculeError


class TransportError(BasculeError):
    """Bytes could not be moved. Names what was done, the peer, the size and the seconds."""
