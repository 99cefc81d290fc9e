"""What a transport is: a group of ranks that exchange bytes. The one interface that gloo and NCCL fit."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from bridge.assembler import ContentError
from bridge.transport.errors import TransportError


class Group(Protocol):
    """Ranks that exchange contiguous uint8 tensors, one thread at a time for each direction.

    Every call blocks until its part is done and raises TransportError when a peer is gone or the group's timeout
    has passed. After an error the group is of no use: close it and connect on a new port.
    """

    @property
    def waits_for(self) -> str:
        """The peer from which a call receives right now; empty when there is none."""
        ...

    def broadcast(self, t: torch.Tensor, root: int) -> None:
        """Fill `t` on all ranks with the bytes of the root's."""
        ...

    def send(self, t: torch.Tensor, dst: int) -> None:
        """Send the bytes of `t` to rank `dst`, which has to receive as many."""
        ...

    def recv(self, t: torch.Tensor, src: int) -> None:
        """Fill `t` with bytes from rank `src`."""
        ...

    def recv_each(self, parts: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Fill each tensor with bytes from its rank, from all ranks at the same time."""
        ...

    def close(self) -> None:
        """Leave; peers that wait for this rank fail. May be called again."""
        ...


@contextmanager
def naming(where: str) -> Generator[None]:
    """Put `where` before the message of an error about bytes or their content."""
    try:
        yield
    except (TransportError, ContentError) as error:
        raise type(error)(f"{where}: {error}") from error
