"""The files around the weights: which are copied, and what config.json says afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.side_files import LATEST, SOURCE_INDEX, adapt_config, copy_side_files
from configs.errors import WriteError


def test_side_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    (source / "iter_0000001").mkdir(parents=True)
    kept = ("chat_template.jinja", "config.json", "generation_config.json", "modeling.py", "tokenizer.json")
    left = ("model.safetensors", "model.safetensors.index.json", "old.bin", LATEST, SOURCE_INDEX, "a.distcp")
    for name in (*kept, *left):
        (source / name).write_text(name)
    assert copy_side_files(source, target) == sorted(kept)
    assert sorted(path.name for path in target.iterdir()) == sorted(kept)
    assert (target / "config.json").read_text() == "config.json"
    with pytest.raises(WriteError, match=r"source/chat_template.jinja: cannot be copied to .*/none: No such"):
        copy_side_files(source, tmp_path / "none")


CONFIG = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("config", "dtype", "quantized", "expected"),
    [
        (CONFIG, None, False, {"model_type": "llama", "dtype": "bfloat16"}),
        (CONFIG, torch.bfloat16, False, {"model_type": "llama", "dtype": "bfloat16"}),
        (CONFIG, torch.float32, True, CONFIG | {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, torch.float16, False, {"dtype": "float16"}),
        ({"model_type": "llama"}, torch.float16, False, {"model_type": "llama", "dtype": "float16"}),
    ],
)
def test_a_config_says_what_the_tensors_are_and_else_what_it_said(
    tmp_path: Path,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    quantized: bool,
    expected: dict[str, Any],
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    adapt_config(path, dtype, quantized=quantized)
    assert json.loads(path.read_text()) == expected


def test_a_config_that_is_right_stays_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ('{"torch_dtype":   "bfloat16"}', '{"dtype":   "bfloat16"}'):
        path.write_text(text)
        adapt_config(path, torch.bfloat16, quantized=False)
        assert path.read_text() == text
