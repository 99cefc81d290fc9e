"""Which adapters engines cannot have, and what vLLM is told of those that they can."""

from pathlib import Path
from typing import Any

import pytest

from actors.engine_settings import engine_arguments
from actors.engine_support import check_adapter_modules
from configs.errors import ConfigError
from tests.actors.engine_helpers import run_config

LAYER = "model.layers.1"
LLAMA = {"model_type": "llama", "vocab_size": 300}
DEEPSEEK = {"model_type": "deepseek_v3", "vocab_size": 300}


def test_modules_that_vllm_adapts_are_not_refused() -> None:
    check_adapter_modules(LLAMA, [f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj", "lm_head"])
    check_adapter_modules(DEEPSEEK, [f"{LAYER}.mlp.gate", f"{LAYER}.mlp.shared_experts.up_proj"])
    check_adapter_modules(DEEPSEEK, [f"{LAYER}.mlp.experts.3.up_proj"], device="cuda")


@pytest.mark.parametrize(
    ("config", "module", "why"),
    [
        (DEEPSEEK, f"{LAYER}.mlp.experts.3.up_proj", "cannot adapt experts on CPU"),
        (DEEPSEEK, f"{LAYER}.self_attn.kv_b_proj", "vLLM 0.32 ignores that"),
        ({**LLAMA, "vocab_size": 300_000}, "lm_head", "up to a vocabulary of 258048"),
    ],
)
def test_modules_that_vllm_does_not_adapt_are_named(config: dict[str, Any], module: str, why: str) -> None:
    with pytest.raises(
        ConfigError, match=f"target_modules: {module} is adapted, and .*{why}.*merged weights"
    ):
        check_adapter_modules(config, [f"{LAYER}.self_attn.o_proj", module])


def test_room_is_the_least_that_holds_the_rank() -> None:
    config = run_config(Path("/none"))
    ranks = {
        rank: engine_arguments(config, "m", "cpu", max_lora_rank=rank)["max_lora_rank"]
        for rank in (1, 7, 8, 9, 300)
    }
    assert ranks == {1: 1, 7: 8, 8: 8, 9: 16, 300: 320}
    assert "enable_lora" not in engine_arguments(config, "m", "cpu")
    with pytest.raises(ConfigError, match="lora_rank: vLLM takes ranks up to 512, the adapter has 513"):
        engine_arguments(config, "m", "cpu", max_lora_rank=513)
