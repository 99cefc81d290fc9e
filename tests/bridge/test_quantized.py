"""Dequantizing against transformers and by hand."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bridge import checkpoint
from bridge.checkpoint import CheckpointError, CheckpointReader
from bridge.layouts import Region, region_of, slices
from bridge.plan import TensorInfo


def fp8(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul(3).to(torch.float8_e4m3fn)


def scales(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4


def random_bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def write(directory: Path, tensors: dict[str, torch.Tensor], **quantization_config: Any) -> None:
    save_file(tensors, directory / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": quantization_config or None}
    (directory / "config.json").write_text(json.dumps(config))


def read_all(reader: CheckpointReader, name: str) -> torch.Tensor:
    return reader.read(name, region_of(reader.tensors[name].shape))


@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)], ids=["matrix", "experts"])
def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = fp8(*shape)
    scale = scales(*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    write(
        tmp_path, {"x.weight": weight, "x.weight_scale_inv": scale, "norm": torch.ones(3)}, quant_method="fp8"
    )
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.bfloat16)
    with CheckpointReader(tmp_path) as reader:
        assert reader.quantized
        assert reader.tensors == {
            "x.weight": TensorInfo(name="x.weight", dtype=torch.bfloat16, shape=shape),
            "norm": TensorInfo(name="norm", dtype=torch.float32, shape=(3,)),
        }
        assert torch.equal(read_all(reader, "x.weight"), expected)
        assert torch.equal(read_all(reader, "norm"), torch.ones(3))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [checkpoint._QUANTIZED_CHUNK, 64])
def test_any_region_of_fp8_with_blocks_that_do_not_divide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale_dtype: torch.dtype, chunk: int
) -> None:
    """As in DeepSeek's kv_a_proj with 576 rows, which transformers does not dequantize: so by hand."""
    monkeypatch.setattr(checkpoint, "_QUANTIZED_CHUNK", chunk)
    weight, scale = fp8(7, 10), scales(3, 3).to(scale_dtype)
    write(tmp_path, {"w": weight, "w_scale_inv": scale}, quant_method="fp8", weight_block_size=[3, 4])
    expected = torch.stack(
        [
            torch.stack(
                [weight[row, column].float() * scale[row // 3, column // 4].float() for column in range(10)]
            )
            for row in range(7)
        ]
    ).to(torch.bfloat16)
    chance = random.Random(0)
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(read_all(reader, "w"), expected)
        for _ in range(50):
            region = random_box((7, 10), chance)
            assert torch.equal(reader.read("w", region), expected[slices(region)])
            out = torch.zeros(expected[slices(region)].shape).T.contiguous().T
            reader.read_into("w", region, out)
            assert torch.equal(out, expected[slices(region)].float())


def random_box(shape: tuple[int, ...], chance: random.Random) -> Region:
    starts = [chance.randrange(size) for size in shape]
    return tuple((start, chance.randint(start + 1, size)) for start, size in zip(starts, shape, strict=True))


def test_mxfp4_of_every_byte_and_scale_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """All 256 bytes under all 256 scales: 4096 groups of 16 bytes, in two experts."""
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    blocks = every_byte.repeat(256, 1).reshape(2, 32, 64, 16)
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(16).reshape(2, 32, 64)
    write(
        tmp_path,
        {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scale},
        quant_method="mxfp4",
    )
    expected = convert_moe_packed_tensors(blocks, scale)
    with CheckpointReader(tmp_path) as reader:
        assert reader.quantized
        info = TensorInfo(name="experts.down_proj", dtype=torch.bfloat16, shape=(2, 2048, 32))
        assert reader.tensors == {info.name: info}
        read = read_all(reader, info.name)
    assert torch.equal(
        read.view(torch.int16)[~expected.isnan()], expected.view(torch.int16)[~expected.isnan()]
    )
    assert torch.equal(read.isnan(), expected.isnan())


def test_mxfp4_by_hand(tmp_path: Path) -> None:
    """The low half of a byte comes first; 0x3A is -1.0 (1010) then 1.5 (0011), here times 2^(128-127)."""
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 1, 0, 3] = 0x3A
    scale = torch.full((1, 2, 1), 128, dtype=torch.uint8)
    write(tmp_path, {"k_blocks": blocks, "k_scales": scale}, quant_method="mxfp4")
    expected = torch.zeros(1, 32, 2, dtype=torch.bfloat16)
    expected[0, 6, 1], expected[0, 7, 1] = -2.0, 3.0
    with CheckpointReader(tmp_path) as reader:
        assert torch.equal(read_all(reader, "k"), expected)


@pytest.mark.parametrize("chunk", [checkpoint._QUANTIZED_CHUNK, 100])
def test_any_region_of_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(checkpoint, "_QUANTIZED_CHUNK", chunk)
    blocks, scale = random_bytes(3, 5, 4, 16), random_bytes(3, 5, 4, low=100, high=140)
    write(tmp_path, {"k_blocks": blocks, "k_scales": scale}, quant_method="mxfp4")
    expected = convert_moe_packed_tensors(blocks, scale)
    chance = random.Random(0)
    with CheckpointReader(tmp_path) as reader:
        assert reader.position("k")[0] == "model.safetensors"
        for _ in range(50):
            region = random_box((3, 128, 5), chance)
            assert torch.equal(reader.read("k", region), expected[slices(region)])


def test_only_the_blocks_of_a_region_are_read(tmp_path: Path) -> None:
    tensors = {
        "w": fp8(512, 384),
        "w_scale_inv": scales(4, 3),
        "k_blocks": random_bytes(4, 6, 3, 16),
        "k_scales": random_bytes(4, 6, 3, high=200),
    }
    write(tmp_path, tensors)
    with CheckpointReader(tmp_path) as reader:
        assert reader.nbytes == sum(value.nbytes for value in tensors.values())
        reader.read("w", ((128, 256), (0, 256)))
        assert reader.bytes_read == 128 * 256 + 2 * 4
        before = reader.bytes_read
        reader.read("k", ((1, 2), (0, 40), (2, 5)))
        assert reader.bytes_read - before == 3 * 2 * 16 + 3 * 2


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({"w": fp8(4, 4)}, {}, "w: is FP8 without w_scale_inv"),
        ({"w": fp8(4), "w_scale_inv": scales(1)}, {}, "w: is FP8 of shape"),
        (
            {"w": fp8(130, 4), "w_scale_inv": scales(1, 1)},
            {},
            r"w_scale_inv: .*needs floats of shape \(2, 1\)",
        ),
        ({"w": fp8(4, 4), "w_scale_inv": random_bytes(1, 1)}, {}, r"w_scale_inv: is torch.uint8"),
        ({"k_blocks": random_bytes(1, 2, 1, 16)}, {}, "k_blocks: is there without k_scales"),
        ({"k_blocks": random_bytes(1, 2, 16), "k_scales": random_bytes(1, 2)}, {}, "k_blocks: has shape"),
        (
            {"k_blocks": random_bytes(1, 2, 1, 16), "k_scales": random_bytes(1, 3, 1)},
            {},
            r"k_scales: .* \(1, 2, 1\)",
        ),
        (
            {
                "k_blocks": random_bytes(1, 2, 1, 16),
                "k_scales": random_bytes(1, 2, 1),
                "k": torch.ones(1, 32, 2),
            },
            {},
            "k: is there by itself and as k_blocks",
        ),
        (
            {"w": torch.ones(2)},
            {"quant_method": "awq"},
            "config.json: quantized with awq; can be read: fp8, mxfp4",
        ),
        ({"w": torch.ones(2)}, {"weight_block_size": [128]}, r"config.json: weight_block_size is \[128\]"),
    ],
)
def test_what_cannot_be_dequantized_is_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], words: str
) -> None:
    write(tmp_path, tensors, **config)
    with pytest.raises(CheckpointError, match=words) as caught:
        CheckpointReader(tmp_path)
    assert str(tmp_path) in str(caught.value)
