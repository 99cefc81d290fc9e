"""Checkpoints with blockwise FP8 or MXFP4 weights, seen as the BF16 tensors that they stand for.

FP8 (DeepSeek): `X` float8_e4m3fn [..., O, I] with `X_scale_inv` [..., ceil(O/b), ceil(I/c)]; the value is
weight * scale. MXFP4 (OCP Microscaling, in gpt_oss's arrangement): `X_blocks` uint8 [E, R, C/32, 16], two e2m1
values a byte, the low half first, with `X_scales` uint8 [E, R, C/32]; the value is e2m1 * 2^(scale - 127). It
is presented transposed, [E, C, R], as gpt_oss's BF16 files and transformers have it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from bridge.layouts import Region
from bridge.plan import TensorInfo
from bridge.safetensors_file import CheckpointError, boxes, parse_json

ReadStored = Callable[[str, Region], torch.Tensor]
"""Reads a region of a tensor as it is stored."""

_GROUP = 32  # values that share a scale in MXFP4
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_METHODS = ("fp8", "mxfp4")
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Quantized(Protocol):
    """A BF16 tensor that is computed from stored ones."""

    @property
    def info(self) -> TensorInfo:
        """The tensor as it is presented."""
        ...

    @property
    def parts(self) -> tuple[str, str]:
        """Names of the stored tensors: values, scales."""
        ...

    def boxes(self, region: Region, max_numel: int) -> Iterator[Region]:
        """The region as boxes of at most `max_numel` elements that are cheap to read one by one."""
        ...

    def dequantize(self, read: ReadStored, region: Region) -> torch.Tensor:
        """The region's values in BF16, from the blocks it touches."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockwiseFp8:
    """FP8 with one scale for each `block` of the last two dimensions."""

    info: TensorInfo
    parts: tuple[str, str]
    block: tuple[int, int]

    def boxes(self, region: Region, max_numel: int) -> Iterator[Region]:
        """Row ranges."""
        return boxes(region, max_numel)

    def dequantize(self, read: ReadStored, region: Region) -> torch.Tensor:
        """Computed in float32 and rounded once, as transformers does it."""
        *leading, rows, columns = region
        height, width = self.block
        values = _look_up(_fp8_values(), read(self.parts[0], region).view(torch.uint8))
        scales = read(self.parts[1], (*leading, _blocks(rows, height), _blocks(columns, width))).float()
        row = torch.arange(*rows) // height - rows[0] // height
        column = torch.arange(*columns) // width - columns[0] // width
        return values.mul_(scales.index_select(-1, column).index_select(-2, row)).to(torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4:
    """Experts in MXFP4, [E, C, R] from stored [E, R, C/32, 16]."""

    info: TensorInfo
    parts: tuple[str, str]

    def boxes(self, region: Region, max_numel: int) -> Iterator[Region]:
        """Ranges of stored rows, so that no block is read twice unless a single row exceeds `max_numel`."""
        experts, columns, rows = region
        for expert, row, column in boxes((experts, rows, columns), max_numel):
            yield expert, column, row

    def dequantize(self, read: ReadStored, region: Region) -> torch.Tensor:
        """Exact but for results beyond BF16's range, as transformers does it (also for a scale of 255)."""
        experts, columns, rows = region
        groups = _blocks(columns, _GROUP)
        packed = read(self.parts[0], (experts, rows, groups, (0, _GROUP // 2)))
        exponents = read(self.parts[1], (experts, rows, groups)).int() - 128
        scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents).to(torch.bfloat16)
        values = _look_up(_doubled_pairs(), packed).view(torch.bfloat16).mul_(scales.unsqueeze(-1)).flatten(2)
        skipped = columns[0] - groups[0] * _GROUP
        return values[..., skipped : skipped + columns[1] - columns[0]].transpose(1, 2)


def find_quantized(
    stored: Mapping[str, TensorInfo], block: tuple[int, int]
) -> tuple[dict[str, Quantized], dict[str, str]]:
    """The quantized tensors by the name they go by, and what is wrong with other stored ones, by theirs."""
    found: dict[str, Quantized] = {}
    problems: dict[str, str] = {}
    for name, info in stored.items():
        try:
            if info.dtype == torch.float8_e4m3fn:
                found[name] = _fp8(info, stored, block)
            elif info.dtype == torch.uint8 and name.endswith("_blocks"):
                found[name.removesuffix("_blocks")] = _mxfp4(info, stored)
        except CheckpointError as error:
            problems[name] = str(error)
    return found, problems


def weight_block_size(directory: Path) -> tuple[int, int]:
    """Rows and columns that share an FP8 scale, from config.json; 128 x 128 when it does not say.

    Raises CheckpointError naming the file for a quantization that cannot be read.
    """
    path = directory / "config.json"
    if not path.is_file():
        return 128, 128
    config = parse_json(path, path.read_bytes()).get("quantization_config") or {}
    if config.get("quant_method", "fp8") not in _METHODS:
        raise CheckpointError(
            f"{path}: quantized with {config['quant_method']}; can be read: {', '.join(_METHODS)}"
        )
    match config.get("weight_block_size"):
        case None:
            return 128, 128
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case other:
            raise CheckpointError(f"{path}: weight_block_size is {other}, not two positive integers")


def _fp8(info: TensorInfo, stored: Mapping[str, TensorInfo], block: tuple[int, int]) -> BlockwiseFp8:
    scales = stored.get(f"{info.name}_scale_inv")
    if scales is None:
        raise CheckpointError(
            f"{info.name}: is FP8 without {info.name}_scale_inv; only blockwise FP8 can be read"
        )
    if len(info.shape) < 2:
        raise CheckpointError(f"{info.name}: is FP8 of shape {info.shape}, which has no blocks")
    rows, columns = (-(-size // side) for size, side in zip(info.shape[-2:], block, strict=True))
    expected = (*info.shape[:-2], rows, columns)
    if scales.shape != expected or scales.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scales.name}: is {scales.dtype} of shape {scales.shape}; {info.name} of shape {info.shape} "
            f"in blocks of {block} needs floats of shape {expected}"
        )
    logical = TensorInfo(name=info.name, dtype=torch.bfloat16, shape=info.shape)
    return BlockwiseFp8(info=logical, parts=(info.name, scales.name), block=block)


def _mxfp4(info: TensorInfo, stored: Mapping[str, TensorInfo]) -> Mxfp4:
    name = info.name.removesuffix("_blocks")
    scales = stored.get(f"{name}_scales")
    if scales is None:
        raise CheckpointError(f"{info.name}: is there without {name}_scales")
    if name in stored:
        raise CheckpointError(f"{name}: is there by itself and as {info.name}")
    if len(info.shape) != 4 or info.shape[-1] != _GROUP // 2:
        raise CheckpointError(f"{info.name}: has shape {info.shape}; MXFP4 needs [experts, rows, groups, 16]")
    if scales.shape != info.shape[:-1] or scales.dtype != torch.uint8:
        raise CheckpointError(
            f"{scales.name}: is {scales.dtype} of shape {scales.shape}; {info.name} needs torch.uint8 of shape "
            f"{info.shape[:-1]}"
        )
    experts, rows, groups, _ = info.shape
    logical = TensorInfo(name=name, dtype=torch.bfloat16, shape=(experts, groups * _GROUP, rows))
    return Mxfp4(info=logical, parts=(info.name, scales.name))


def _blocks(side: tuple[int, int], size: int) -> tuple[int, int]:
    """The blocks of `size` that a range of elements touches."""
    start, stop = side
    return start // size, -(-stop // size)


def _look_up(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`table[indices]` for bytes; ten times faster on CPU than indexing, or than casting from FP8."""
    return table.index_select(0, indices.flatten().int()).view(indices.shape)


def _doubled_pairs() -> torch.Tensor:
    """For every byte the doubles of its two values, BF16, seen as one int32.

    Doubled, so that 2^(scale - 128), which is left to multiply with, is in BF16's range for every scale.
    """
    values = torch.tensor(_E2M1, dtype=torch.bfloat16) * 2
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1).view(torch.int32).flatten()


def _fp8_values() -> torch.Tensor:
    """The float32 value of every byte."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
