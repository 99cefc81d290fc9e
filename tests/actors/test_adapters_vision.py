"""Which modules of a model that sees LoRA adapts, against what PEFT adapts by the config that is written."""

import contextlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from actors.adapter_source import find_adapter
from actors.engine_support import check_adapter_modules
from bridge.model_bridge import ModelBridge
from configs.errors import ConfigError
from configs.tuner import TunerConfig
from configs.vision import VisionConfig
from tests.bridge.family_models import SIGHTED, build, save

NOT_ADAPTED = "is adapted, and vLLM 0.32 adapts only the language model of one that sees"


# PEFT adapts no packed expert.
@pytest.mark.parametrize(
    "family", [name for name in SIGHTED if name not in ("qwen3_vl_moe", "internvl qwen3 tied")]
)
def test_peft_adapts_the_same_parts_of_a_model_that_sees(family: str, tmp_path: Path) -> None:
    """Names in its parts are often the same (gate_proj), or those of a convolution (proj) or in a list (0)."""
    config = SIGHTED[family]
    model = build(config)
    save(model, config, tmp_path)
    base = ModelBridge(tmp_path)
    assert base.spec.vision is not None
    everything: set[str] = set()
    for part in ("llm", "vit", "aligner"):
        vision = VisionConfig.model_validate(
            {f"freeze_{name}": name != part for name in ("llm", "vit", "aligner")}
        )
        source = find_adapter(TunerConfig(tuner_type="lora", lora_dropout=0.0), base, vision)
        assert source is not None
        assert adapted_by_peft(tmp_path, source.peft_config(tmp_path)) == source.modules
        assert source.modules
        refused = contextlib.nullcontext() if part == "llm" else pytest.raises(ConfigError, match=NOT_ADAPTED)
        with refused:
            check_adapter_modules(config.to_dict(), source.modules, vision=base.spec.vision)
        everything |= source.modules
    vision = VisionConfig(freeze_vit=False, freeze_aligner=False)
    source = find_adapter(TunerConfig(tuner_type="lora", lora_dropout=0.0), base, vision)
    assert source is not None
    assert source.modules == everything
    assert adapted_by_peft(tmp_path, source.peft_config(tmp_path)) == everything
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - {"lm_head"} == everything


def adapted_by_peft(model_dir: Path, settings: dict[str, Any]) -> set[str]:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model_dir))
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig.from_peft_type(**settings))
    return {name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}
