"""Checkpoints for the round-trip tests: random weights of every family in any size, type and number of files."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.bridge.family_models import build, megatron_tensors, save

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FP8_BLOCK = (8, 16)
# Negative zero, the least subnormal of each type, infinity: kept to the bit like any other value.
SPECIAL = (-0.0, math.inf, 1e-40, 6e-8)


def resized(config: hf.PretrainedConfig, **changes: Any) -> hf.PretrainedConfig:
    """A copy of a config with other sizes, which are the language model's in one that sees."""
    values = config.to_dict()
    text = values.get("text_config", values)
    text |= changes
    if "tie_word_embeddings" in changes:
        values["tie_word_embeddings"] = changes["tie_word_embeddings"]
    # It follows from the number of layers.
    text.pop("layer_types", None)
    return type(config).from_dict(values)


def write_source(config: hf.PretrainedConfig, directory: Path, seed: int = 1) -> None:
    """A float32 checkpoint in one file, and beside the directory its weights as Megatron's, converted by hand."""
    model = build(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    save(model, config, directory)
    save_file(
        {name: tensor.contiguous() for name, tensor in megatron_tensors(model, config).items()},
        by_hand(directory),
    )


def by_hand(directory: Path) -> Path:
    """Where write_source puts whole Megatron tensors."""
    return directory.with_suffix(".megatron")


def variant(source: Path, directory: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> None:
    """The checkpoint with other tensors, and with other keys in its config."""
    directory.mkdir()
    values = json.loads((source / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)


def cast(source: Path, directory: Path, dtype: torch.dtype, *, norms: torch.dtype | None = None) -> None:
    """The checkpoint in another type; expert biases stay as they are. Has special values in each tensor."""
    tensors = load_file(source / WEIGHTS)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            continue
        flat = tensor.flatten()
        flat[: len(SPECIAL)] = torch.tensor(SPECIAL)[: len(flat)]
        kind = norms if norms is not None and "norm" in name else dtype
        tensors[name] = flat.view(tensor.shape).to(kind)
    variant(source, directory, tensors, dtype=str(dtype).removeprefix("torch."))


def split(source: Path, directory: Path, files: int) -> None:
    """The checkpoint in several files with an index; neighbours in name are in different files."""
    tensors = load_file(source / WEIGHTS)
    variant(source, directory, {})
    (directory / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::files]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


def quantize_fp8(source: Path, directory: Path, expected: Path) -> None:
    """Projections in blockwise FP8, the rest in bfloat16; `expected` has the values they stand for."""
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(2)
    for name, tensor in load_file(source / WEIGHTS).items():
        if not name.endswith("_proj.weight"):
            stored[name] = values[name] = tensor.to(torch.bfloat16)
            continue
        rows, columns = tensor.shape
        scales = torch.rand(-(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1]), generator=generator)
        stored[name], stored[f"{name}_scale_inv"] = (30 * tensor).to(torch.float8_e4m3fn), scales
        every = scales.repeat_interleave(FP8_BLOCK[0], 0).repeat_interleave(FP8_BLOCK[1], 1)
        values[name] = (stored[name].float() * every[:rows, :columns]).to(torch.bfloat16)
    quantization = {"quant_method": "fp8", "weight_block_size": list(FP8_BLOCK)}
    variant(source, directory, stored, quantization_config=quantization, dtype="bfloat16")
    variant(source, expected, values, dtype="bfloat16")


def quantize_mxfp4(source: Path, directory: Path, expected: Path) -> None:
    """Weights of experts in MXFP4, the rest in bfloat16; `expected` has what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in load_file(source / WEIGHTS).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = values[name] = tensor.to(torch.bfloat16)
            continue
        experts, columns, rows = tensor.shape
        groups = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 130, groups, dtype=torch.uint8, generator=generator)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        values[name] = convert_moe_packed_tensors(blocks, scales)
    variant(source, directory, stored, quantization_config={"quant_method": "mxfp4"}, dtype="bfloat16")
    variant(source, expected, values, dtype="bfloat16")


def edited(source: Path, directory: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """The checkpoint with some tensors replaced or added, or removed where the change is None."""
    tensors = {**load_file(source / WEIGHTS), **changes}
    variant(source, directory, {name: tensor for name, tensor in tensors.items() if tensor is not None})
