"""Tiny models of every family with sizes that are not powers of two, and what one step of transformers gives.

Weights are random; Megatron's side of them comes from the conversion by hand in tests/bridge/family_models.py.
"""

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import megatron_vision
import torch
import transformers as hf
from megatron_vision import IDS, IMAGE, MERGE, PATCH, TILE
from megatron_worker_reference import (
    BETAS,
    EPS,
    LR,
    WEIGHT_DECAY,
    make_sequences,
    reference_logits,
    reference_logprobs,
    reference_step,
)

from algorithms.data import MicroBatch
from tests.bridge.family_models import decoder_layer, megatron_tensors

CLIP_GRAD = 0.05
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
GROUPS = {**SIZES, "num_key_value_heads": 2}
ONE_GROUP = {**SIZES, "num_key_value_heads": 1}
# Three groups cannot be shared by two ranks; these are for layouts without tensor parallelism.
THREE_GROUPS = {**SIZES, "num_attention_heads": 12, "num_key_value_heads": 3}
EXPERTS = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
LATENT = {
    **SIZES,
    "num_key_value_heads": 6,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
}
GROUPED = {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 4}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LATENT_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
OSS = {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4}

CONFIGS: dict[str, hf.PretrainedConfig] = {
    "llama": hf.LlamaConfig(**GROUPS),
    "llama-3-groups": hf.LlamaConfig(**THREE_GROUPS),
    "llama-biases": hf.LlamaConfig(**GROUPS, attention_bias=True, mlp_bias=True),
    "mistral": hf.MistralConfig(**GROUPS, head_dim=8, sliding_window=5),
    "qwen2-tied": hf.Qwen2Config(**{**GROUPS, "tie_word_embeddings": True}),
    "qwen3": hf.Qwen3Config(**GROUPS, head_dim=8),
    "qwen3-12-heads": hf.Qwen3Config(**{**GROUPS, "num_attention_heads": 12}, head_dim=8),
    "qwen3-1-group": hf.Qwen3Config(**ONE_GROUP, head_dim=8),
    "glm4": hf.Glm4Config(**GROUPS, head_dim=8),
    "seed_oss": hf.SeedOssConfig(**GROUPS, head_dim=8),
    "mixtral": hf.MixtralConfig(**GROUPS, num_local_experts=6, num_experts_per_tok=2),
    "qwen2_moe": hf.Qwen2MoeConfig(
        **GROUPS, **EXPERTS, num_experts=6, shared_expert_intermediate_size=36, decoder_sparse_step=2
    ),
    "qwen3_moe": hf.Qwen3MoeConfig(
        **GROUPS, **EXPERTS, num_experts=6, head_dim=8, mlp_only_layers=[1], norm_topk_prob=True
    ),
    "qwen3_moe-unnormalized": hf.Qwen3MoeConfig(
        **GROUPS, **EXPERTS, num_experts=6, head_dim=8, norm_topk_prob=False
    ),
    "deepseek_v2": hf.DeepseekV2Config(
        **LATENT, q_lora_rank=None, n_routed_experts=6, num_experts_per_tok=2, routed_scaling_factor=1.5
    ),
    "deepseek_v2-grouped": hf.DeepseekV2Config(
        **LATENT, **(GROUPED | {"num_experts_per_tok": 3}), q_lora_rank=9, topk_method="group_limited_greedy"
    ),
    "deepseek_v3": hf.DeepseekV3Config(**LATENT, **GROUPED, q_lora_rank=9),
    "deepseek_v3-yarn": hf.DeepseekV3Config(
        **LATENT, **GROUPED, q_lora_rank=None, rope_parameters=LATENT_YARN
    ),
    "glm4_moe": hf.Glm4MoeConfig(
        **GROUPS, **EXPERTS, n_routed_experts=6, head_dim=8, use_qk_norm=True, attention_bias=True
    ),
    "gpt_oss": hf.GptOssConfig(
        **GROUPS, **OSS, rope_parameters={"rope_type": "default", "rope_theta": 150000.0}
    ),
    "gpt_oss-yarn": hf.GptOssConfig(**GROUPS, **OSS, rope_parameters={**YARN, "truncate": False}),
}

TEXT = {**GROUPS, "head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
TOWER: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE}
TOWER |= {"hidden_size": 16, "intermediate_size": 20, "out_hidden_size": 24}
QWEN3_TOWER = {**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
SIGHTED: dict[str, hf.PretrainedConfig] = {
    "qwen2_vl": hf.Qwen2VLConfig(
        **IDS,
        text_config={**TEXT, "hidden_size": 48},
        vision_config={**TOWER, "embed_dim": 16, "hidden_size": 48, "mlp_ratio": 2},
        tie_word_embeddings=True,
    ),
    "qwen2_5_vl": hf.Qwen2_5_VLConfig(
        **IDS,
        text_config={**TEXT, "hidden_size": 48},
        vision_config={**TOWER, "out_hidden_size": 48, "window_size": 8, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": hf.Qwen3VLConfig(**IDS, text_config=TEXT, vision_config=QWEN3_TOWER),
    "qwen3_vl_moe": hf.Qwen3VLMoeConfig(
        **IDS,
        text_config={**TEXT, **EXPERTS, "moe_intermediate_size": 8, "num_experts": 6},
        vision_config=QWEN3_TOWER,
    ),
    "internvl": hf.InternVLConfig(
        image_token_id=IMAGE,
        text_config={
            "model_type": "qwen3",
            **GROUPS,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        tie_word_embeddings=False,
    ),
}
CONFIGS |= SIGHTED


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """One step of transformers and torch's AdamW; weights and gradients are whole Megatron tensors.

    `logits` and `logprobs` are those of each of the `rows`, alone.
    """

    config: dict[str, Any]
    rows: list[MicroBatch]
    logits: list[torch.Tensor]
    logprobs: list[torch.Tensor]
    loss: float
    grad_norm: float
    weights: dict[str, torch.Tensor]
    grads: dict[str, torch.Tensor]
    weights_after: dict[str, torch.Tensor]


def build(config: hf.PretrainedConfig) -> hf.PreTrainedModel:
    """A float32 model with random weights, the same in every process."""
    kind = hf.AutoModelForImageTextToText if "vision_config" in config.to_dict() else hf.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model


@cache
def reference(family: str) -> Reference:
    """What Megatron is compared with; computed once per process."""
    config = copy.deepcopy(CONFIGS[family])
    hf_config = config.to_dict()
    if "num_nextn_predict_layers" in hf_config:
        # transformers builds no multi-token-prediction layers, so there are no weights for them.
        config.num_nextn_predict_layers = 0
    model = build(config)
    sighted = family in SIGHTED
    rows = megatron_vision.make_sequences(config) if sighted else make_sequences(config.vocab_size)
    with torch.no_grad():
        logits = [reference_logits(model, row) for row in rows]
        logprobs = [reference_logprobs(model, row) for row in rows]
    weights = cloned(megatron_tensors(model, config))
    loss, _, norm = reference_step(model, optimizer_of(model), rows, CLIP_GRAD)
    return Reference(
        config=hf_config,
        rows=rows,
        logits=logits,
        logprobs=logprobs,
        loss=loss,
        grad_norm=norm,
        weights=weights,
        grads=gradients(model, config),
        weights_after=cloned(megatron_tensors(model, config)),
    )


def optimizer_of(model: hf.PreTrainedModel) -> torch.optim.AdamW:
    """torch's AdamW with weight decay on matrices; the packed biases of experts are no matrix."""
    decayed: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decayed[parameter.ndim > 1 and not name.endswith("bias")].append(parameter)
    groups = [
        {"params": decayed[True], "weight_decay": WEIGHT_DECAY},
        {"params": decayed[False], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)


def cloned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def gradients(model: hf.PreTrainedModel, config: hf.PretrainedConfig) -> dict[str, torch.Tensor]:
    """The clipped gradients as Megatron tensors: those of a model that has them as its weights."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for mine, other in zip(twin.parameters(), model.parameters(), strict=True):
            mine.zero_()
            if other.grad is not None:
                mine.copy_(other.grad)
    return megatron_tensors(twin, config)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mtp:
    """A multi-token-prediction layer by hand on transformers' decoder layer: its weights, input and output."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    tokens_T: torch.Tensor
    hidden_TH: torch.Tensor
    output_TH: torch.Tensor


def mtp_reference() -> Mtp:
    """DeepSeek-V3's (arXiv 2412.19437, equations 21 and 22), on a sequence whose tokens move up by one."""
    config = copy.deepcopy(CONFIGS["deepseek_v3"])
    hf_config = config.to_dict()
    config.num_hidden_layers += 1
    model = build(config)
    extra = model.model.layers[-1]
    del model.model.layers[-1]
    torch.manual_seed(4)
    size, tokens = config.hidden_size, 9
    own = {name: 1 + 0.2 * torch.randn(size) for name in ("enorm", "hnorm", "final_layernorm")}
    own["eh_proj"] = 0.15 * torch.randn(size, 2 * size)
    tokens_T, hidden_TH = torch.randint(0, config.vocab_size, (tokens,)), torch.randn(tokens, size)
    next_T = torch.cat([tokens_T[1:], tokens_T.new_zeros(1)])
    with torch.no_grad():
        embedded = norm(model.model.embed_tokens(next_T), own["enorm"])
        inputs = torch.cat([embedded, norm(hidden_TH, own["hnorm"])], dim=1) @ own["eh_proj"].T
        mask = torch.full((1, 1, tokens, tokens), float("-inf")).triu(1)
        rotary = model.model.rotary_emb(inputs[None], torch.arange(tokens)[None])
        output = extra(inputs[None], attention_mask=mask, position_embeddings=rotary)[0]
    weights = {f"mtp.layers.0.{name}.weight": tensor for name, tensor in own.items()}
    for name, tensor in decoder_layer(extra, config).items():
        weights[f"mtp.layers.0.transformer_layer.{name}"] = tensor.detach()
    config.num_hidden_layers -= 1
    config.num_nextn_predict_layers = 0
    return Mtp(
        config=hf_config,
        weights=weights | megatron_tensors(model, config),
        tokens_T=tokens_T,
        hidden_TH=hidden_TH,
        output_TH=norm(output, own["final_layernorm"]),
    )


def norm(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(values, weight.shape, weight, SIZES["rms_norm_eps"])
