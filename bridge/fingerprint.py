"""64-bit hashes of tensor content: made where weights come from, compared where they arrive.

In host memory it is xxh3, which runs about as fast as memory is read. Where bytes never leave a GPU, a sum of
products does the same work there; both ends of a transport hash in the same place, so the two are never compared.
"""

import torch
import xxhash

from bridge.safetensors_file import as_bytes

_WORDS = 1 << 16
_MIX = 0x9E3779B97F4A7C15


def fingerprint(data: torch.Tensor) -> int:
    """Hash, 0 to 2**64 - 1, of a contiguous uint8 tensor. On a GPU it is untested on a real one."""
    if data.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(as_bytes(data))
    return device_fingerprint(data)


def device_fingerprint(data: torch.Tensor) -> int:
    """The hash of bytes that stay on their device: sum of 64-bit words times odd pseudo-random factors.

    Modulo 2**64. A changed word changes the sum for sure, several ones with all but vanishing probability;
    made against faults, not against an adversary.
    """
    tail = -data.numel() % 8
    padded = torch.nn.functional.pad(data, (0, tail)) if tail else data
    words = padded.view(torch.int64)
    total = torch.full((), data.numel(), dtype=torch.int64, device=data.device)
    for start in range(0, words.numel(), _WORDS):
        block = words[start : start + _WORDS]
        total = total + (block * _factors(start, block.numel(), data.device)).sum()
    return int(total.item()) % (1 << 64)


def _factors(start: int, count: int, device: torch.device) -> torch.Tensor:
    """An odd number for each position: the finalizer of splitmix64 on the counter."""
    x = (torch.arange(start, start + count, dtype=torch.int64, device=device) + 1) * signed(_MIX)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * signed(factor)
    return (x ^ _shifted(x, 31)) | 1


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that fills with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(value: int) -> int:
    """The int64 with the same bits as an unsigned number of 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
