"""Adapters made by PEFT, for tests of engines that take them."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from tests.actors.engine_helpers import make_model

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A PEFT model over a tiny one of transformers, and its adapter as a directory would have it."""

    model: Any
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]


def make_adapter(family: str, seed: int, modules: tuple[str, ...] = LINEARS, **others: Any) -> Adapter:
    """An adapter with random A and B of the model with seed 1; some modules have ranks and alphas of their own."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, "down_proj": 2},
        "alpha_pattern": {"v_proj": 11, "layers.1.mlp.up_proj": 3, "down_proj": 5},
        **others,
    }
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=list(modules), **settings)
    model = get_peft_model(make_model(family, seed=1), config).eval()
    assert isinstance(model, PeftModel)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "lora_embedding" in name:
            with torch.no_grad():
                parameter.normal_(std=0.2, generator=generator)
    tensors = {
        name: tensor.contiguous().clone()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        model.peft_config["default"].save_pretrained(folder)
        stored = json.loads((Path(folder) / "adapter_config.json").read_text())
    return Adapter(model=model, tensors=tensors, config=stored)
