"""What NCCL needs of CuPy, CUDA and torch: everything that only works where there is a GPU, and NCCL's types.

Written against CuPy 14.2 and NCCL 2.x. This project has never run `CudaDevice` or the real NCCL on a GPU.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from bridge.transport.errors import TransportError

# ncclDataType_t in nccl.h.
_UINT8 = 1
_TYPES = {
    torch.int8: 0,
    torch.uint8: _UINT8,
    torch.int32: 2,
    torch.uint32: 3,
    torch.int64: 4,
    torch.uint64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}


def nccl_type(dtype: torch.dtype) -> tuple[int, int]:
    """NCCL's number for a type, and how many of its elements one item is.

    Types that not every NCCL 2.x has, the fp8 ones among them, travel as bytes.
    """
    return (_TYPES[dtype], 1) if dtype in _TYPES else (_UINT8, dtype.itemsize)


class Device(Protocol):
    """What the group needs of a GPU: its memory, and a stream of the group's own."""

    @property
    def stream(self) -> int:
        """Address of the stream."""
        ...

    def activate(self) -> None:
        """Make this the current device of the calling thread."""
        ...

    def holds(self, t: torch.Tensor) -> bool:
        """Whether NCCL can reach the memory of `t`."""
        ...

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory (uint8) for use on the stream."""
        ...

    def follow(self) -> None:
        """Let the stream wait for what the calling thread's current stream has to do so far."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy on the stream."""
        ...

    def mark(self) -> Callable[[], bool]:
        """Tells whether the stream has done what it has to do so far."""
        ...


class CudaDevice:
    """A CUDA device (with its index) as a Device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @property
    def stream(self) -> int:
        """The cudaStream_t."""
        return self._stream.cuda_stream

    def activate(self) -> None:
        """Make this the current device of the calling thread."""
        torch.cuda.set_device(self._device)

    def holds(self, t: torch.Tensor) -> bool:
        """Whether `t` is on this device."""
        return t.device == self._device

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory (uint8) that the allocator ties to the stream."""
        with torch.cuda.stream(self._stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def follow(self) -> None:
        """Record an event on the current stream and let the stream wait for it."""
        self._stream.wait_event(torch.cuda.current_stream(self._device).record_event())

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy on the stream."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], bool]:
        """Record an event on the stream; returns its query."""
        return self._stream.record_event().query


def load_nccl() -> Any:
    """CuPy's NCCL module (its attribute `cupy.cuda.nccl` is not there before this import).

    Raises TransportError saying what to install.
    """
    try:
        from cupy.cuda import nccl  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TransportError(
            f"the transport cupy_nccl needs CuPy ({error}): pip install cupy-cuda12x, or cupy-cuda13x for CUDA 13"
        ) from error
    if not nccl.available:
        raise TransportError("CuPy finds no NCCL library: pip install nvidia-nccl-cu12, or -cu13 for CUDA 13")
    return nccl
