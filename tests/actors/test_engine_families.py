"""A vLLM engine with latent attention, against transformers on the same weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.actors.engine_helpers import (
    EOS,
    VOCABULARY,
    Rig,
    assert_copies_sample_the_same,
    prompt,
    reference_logprobs,
    run_config,
    save_tokenizer,
    settings,
)

pytestmark = pytest.mark.engine
pytest_plugins = ("tests.actors.engine_fixtures",)


def make_deepseek_v3(seed: int) -> Any:
    """A random float32 DeepSeek-V3 with one dense layer and one of experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    model: Any = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=0,
            # vLLM's latent attention on CPU takes only this sum: 512 + 64.
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            q_lora_rank=32,
            qk_nope_head_dim=32,
            v_head_dim=32,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            n_shared_experts=1,
            n_routed_experts=8,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            num_nextn_predict_layers=0,
            # As published: transformers needs neither, vLLM routes like DeepSeek-V2 without them.
            topk_method="noaux_tc",
            scoring_func="sigmoid",
        )
    )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        elif "inv_freq" not in name:
            torch.nn.init.normal_(tensor, std=0.3 if "embed" in name else 0.1)
    return model.to(torch.float32).eval()


@pytest.fixture(scope="module")
def rig(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One engine that has started with the model of seed 1."""
    from ray.util.placement_group import placement_group

    from actors.engine_start import create_engines

    path: Path = tmp_path_factory.mktemp("deepseek_v3")
    model = make_deepseek_v3(seed=1)
    model.save_pretrained(path)
    save_tokenizer(path)
    config = run_config(path)
    group = placement_group([{"CPU": 0.5}])
    assert group.wait(60)
    engines = create_engines(config, str(path), group, [0])
    engines.ready(engines.start(), config.cluster.start_timeout_s)
    yield Rig(engines=engines, model=model, config=config)
    engines.close()


def assert_samples_like(rig: Rig, model: Any) -> None:
    (group,) = rig.engines.generate([(prompt(3, length=30), settings(n=4, max_tokens=20, seed=5))])
    assert len(group.rollouts) == 4
    for index, rollout in enumerate(group.rollouts):
        np.testing.assert_allclose(rollout.logprobs, reference_logprobs(model, group, index), atol=1e-5)


def test_deepseek_v3_samples_like_transformers_at_start_and_after_a_push(rig: Rig) -> None:
    assert_samples_like(rig, rig.model)
    model = make_deepseek_v3(seed=2)
    assert_copies_sample_the_same(rig, rig.model, model, version=1)
    assert_samples_like(rig, model)
