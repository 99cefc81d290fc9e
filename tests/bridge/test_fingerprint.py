"""Hashes of content, against the published value of xxh3 and against a sum in Python's integers."""

from collections.abc import Callable

import pytest
import torch

from bridge.fingerprint import device_fingerprint, fingerprint

MASK = (1 << 64) - 1


def mixed(position: int) -> int:
    """splitmix64's output for counter `position`, made odd."""
    x = (position + 1) * 0x9E3779B97F4A7C15 & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return (x ^ (x >> 31)) | 1


def test_in_host_memory_it_is_xxh3() -> None:
    # The value that the reference implementation gives for no bytes and seed 0.
    assert fingerprint(torch.empty(0, dtype=torch.uint8)) == 0x2D06800538D394C2


@pytest.mark.parametrize("count", [1, 7, 8, 9, 8 * 70_000 + 3])
def test_on_a_device_it_is_a_sum_of_words_times_factors(count: int) -> None:
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    raw = bytes(data.tolist())
    words = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, count, 8)]
    expected = (count + sum(word * mixed(position) for position, word in enumerate(words))) & MASK
    assert device_fingerprint(data) == expected


@pytest.mark.parametrize("hashed", [fingerprint, device_fingerprint])
def test_a_flipped_bit_a_swap_and_a_missing_byte_show(hashed: Callable[[torch.Tensor], int]) -> None:
    data = torch.arange(4096, dtype=torch.int64).view(torch.uint8)
    values = {hashed(data), hashed(data[:-1]), hashed(data[:-8])}
    for at in range(0, 4096 * 8, 1111):
        flipped = data.clone()
        flipped[at] ^= 1
        values.add(hashed(flipped))
    swapped = data.view(torch.int64).clone()
    swapped[[3, 900]] = swapped[[900, 3]]
    values.add(hashed(swapped.view(torch.uint8)))
    assert len(values) == 3 + len(range(0, 4096 * 8, 1111)) + 1
