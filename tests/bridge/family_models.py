"""Tiny models of every family by transformers, and their weights as Megatron's, converted by hand.

The conversion reads the modules of the live model, so it knows nothing of names on disk.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
TWO_GROUPS = {**SIZES, "num_key_value_heads": 2}
THREE_GROUPS = {**SIZES, "num_key_value_heads": 3}
LATENT = {
    **SIZES,
    "num_key_value_heads": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
GROUPED = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
EXPERTS = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 150000.0}

CONFIGS: dict[str, hf.PretrainedConfig] = {
    "llama": hf.LlamaConfig(**THREE_GROUPS),
    "llama tied": hf.LlamaConfig(**TWO_GROUPS, tie_word_embeddings=True),
    "llama with biases": hf.LlamaConfig(**TWO_GROUPS, attention_bias=True, mlp_bias=True),
    "mistral": hf.MistralConfig(**THREE_GROUPS, head_dim=4, sliding_window=None),
    "qwen2": hf.Qwen2Config(**TWO_GROUPS),
    "qwen3": hf.Qwen3Config(**THREE_GROUPS, head_dim=4, tie_word_embeddings=True),
    "glm4": hf.Glm4Config(**TWO_GROUPS, head_dim=4),
    "seed_oss": hf.SeedOssConfig(**THREE_GROUPS, head_dim=4),
    "mixtral": hf.MixtralConfig(**TWO_GROUPS, num_local_experts=6, num_experts_per_tok=2),
    "qwen2_moe": hf.Qwen2MoeConfig(
        **TWO_GROUPS, **EXPERTS, num_experts=6, shared_expert_intermediate_size=36, decoder_sparse_step=2
    ),
    "qwen3_moe": hf.Qwen3MoeConfig(**THREE_GROUPS, **EXPERTS, num_experts=6, head_dim=4, mlp_only_layers=[0]),
    "deepseek_v2": hf.DeepseekV2Config(
        **LATENT, q_lora_rank=None, n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=2
    ),
    "deepseek_v3": hf.DeepseekV3Config(**LATENT, **GROUPED, q_lora_rank=12, n_shared_experts=1),
    "deepseek_v3 without mtp": hf.DeepseekV3Config(
        **LATENT, **GROUPED, q_lora_rank=None, n_shared_experts=1, num_nextn_predict_layers=0
    ),
    "glm4_moe": hf.Glm4MoeConfig(
        **TWO_GROUPS, **EXPERTS, n_routed_experts=6, head_dim=4, use_qk_norm=True, attention_bias=True
    ),
    "gpt_oss": hf.GptOssConfig(
        **THREE_GROUPS,
        num_local_experts=6,
        num_experts_per_tok=2,
        head_dim=4,
        sliding_window=8,
        rope_parameters=YARN,
    ),
}


TINY_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 2, "in_channels": 3}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
INTERLEAVED = {**MROPE, "mrope_interleaved": True}
QWEN3_TOWER = {
    **TINY_TOWER,
    "hidden_size": 16,
    "intermediate_size": 20,
    "out_hidden_size": 24,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
INTERNVL_TOWER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 8,
    "patch_size": 2,
}
SIGHTED: dict[str, hf.PretrainedConfig] = {
    "qwen2_vl": hf.Qwen2VLConfig(
        text_config={**TWO_GROUPS, "hidden_size": 48, "rope_parameters": MROPE},
        vision_config={**TINY_TOWER, "embed_dim": 16, "hidden_size": 48, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": hf.Qwen2_5_VLConfig(
        text_config={**THREE_GROUPS, "hidden_size": 48, "rope_parameters": MROPE},
        vision_config={
            **TINY_TOWER,
            "hidden_size": 16,
            "intermediate_size": 20,
            "out_hidden_size": 48,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=True,
    ),
    "qwen3_vl": hf.Qwen3VLConfig(
        text_config={**TWO_GROUPS, "head_dim": 4, "rope_parameters": INTERLEAVED},
        vision_config=QWEN3_TOWER,
        tie_word_embeddings=True,
    ),
    "qwen3_vl_moe": hf.Qwen3VLMoeConfig(
        text_config={
            **TWO_GROUPS,
            **EXPERTS,
            # How a packed tensor lies is told by its sides: it must not be square.
            "hidden_size": 36,
            "num_experts": 6,
            "head_dim": 4,
            "mlp_only_layers": [0],
            "rope_parameters": INTERLEAVED,
        },
        vision_config={**QWEN3_TOWER, "out_hidden_size": 36},
    ),
    "internvl": hf.InternVLConfig(
        text_config={"model_type": "qwen2", **TWO_GROUPS},
        vision_config=INTERNVL_TOWER,
        tie_word_embeddings=False,
    ),
    "internvl qwen3 tied": hf.InternVLConfig(
        text_config={"model_type": "qwen3", **TWO_GROUPS, "head_dim": 4, "tie_word_embeddings": True},
        vision_config={**INTERNVL_TOWER, "use_qk_norm": True, "attention_bias": True},
        tie_word_embeddings=True,
    ),
}
CONFIGS |= SIGHTED


def text_of(config: hf.PretrainedConfig) -> hf.PretrainedConfig:
    """The config of the language model."""
    return config.get_text_config()


def build(config: hf.PretrainedConfig) -> hf.PreTrainedModel:
    """A model whose every element is another number; it has layers for multi-token prediction at its end.

    transformers itself leaves them out, but each has a decoder layer like the others.
    """
    config = type(config).from_dict(config.to_dict())
    text_of(config).num_hidden_layers += mtp_layers(config)
    sighted = "vision_config" in config.to_dict()
    model = (
        (hf.AutoModelForImageTextToText if sighted else hf.AutoModelForCausalLM).from_config(config).eval()
    )
    counter = itertools.count(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            start = next(counter) * 10_000
            tensor.copy_(torch.arange(start, start + tensor.numel()).view(tensor.shape))
    return model


def mtp_layers(config: hf.PretrainedConfig) -> int:
    """Multi-token-prediction layers; an attribute that only some configs have."""
    return getattr(config, "num_nextn_predict_layers", 0)


def save(model: hf.PreTrainedModel, config: hf.PretrainedConfig, directory: Path) -> None:
    """Write the model as its authors do: `config` without the extra layers, whose own tensors are added.

    Qwen3-VL-MoE's have packed experts with input features first, transformers takes both.
    """
    model.save_pretrained(directory)
    config.save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path) | extra_tensors(model, config)
    if config.model_type == "qwen3_vl_moe":
        packed = ("experts.gate_up_proj", "experts.down_proj")
        tensors |= {
            name: tensor.transpose(1, 2).contiguous()
            for name, tensor in tensors.items()
            if name.endswith(packed)
        }
    save_file(tensors, path)


def extra_tensors(model: hf.PreTrainedModel, config: hf.PretrainedConfig) -> dict[str, torch.Tensor]:
    """What DeepSeek-V3 and GLM-4-MoE write for multi-token prediction besides a decoder layer, by HF name."""
    found: dict[str, torch.Tensor] = {}
    width = text_of(config).hidden_size
    for number in range(mtp_layers(config)):
        prefix = f"model.layers.{config.num_hidden_layers + number}."
        found |= {
            prefix + "enorm.weight": torch.arange(float(width)),
            prefix + "hnorm.weight": 100 + torch.arange(float(width)),
            prefix + "shared_head.norm.weight": 200 + torch.arange(float(width)),
            prefix + "eh_proj.weight": torch.arange(2.0 * width * width).view(width, 2 * width),
            prefix + "embed_tokens.weight": model.model.embed_tokens.weight.detach().clone(),
            prefix + "shared_head.head.weight": model.lm_head.weight.detach().clone(),
        }
    return found


def megatron_tensors(model: hf.PreTrainedModel, config: hf.PretrainedConfig) -> dict[str, torch.Tensor]:
    """All weights as whole Megatron tensors by global Megatron name; linear_fc1 comes as [2, ffn, ...]."""
    tied = config.tie_word_embeddings
    core, config = model.model, text_of(config)
    layers = config.num_hidden_layers
    seen = {}
    if hasattr(core, "language_model"):
        towers = {"visual.": core.visual} if hasattr(core, "visual") else parts_of_internvl(core)
        seen = {
            prefix + name: parameter
            for prefix, tower in towers.items()
            for name, parameter in tower.named_parameters()
        }
        core = core.language_model
    found = seen | {
        "embedding.word_embeddings.weight": core.embed_tokens.weight,
        "decoder.final_layernorm.weight": core.norm.weight,
        "output_layer.weight": model.lm_head.weight,
    }
    if tied:
        del found["output_layer.weight"]
    for number, layer in enumerate(core.layers):
        prefix = f"decoder.layers.{number}."
        if number >= layers:
            prefix = f"mtp.layers.{number - layers}.transformer_layer."
        for name, tensor in decoder_layer(layer, config).items():
            found[prefix + name] = tensor
    extra = extra_tensors(model, config)
    for number in range(mtp_layers(config)):
        mcore, prefix = f"mtp.layers.{number}.", f"model.layers.{layers + number}."
        for name in ("enorm", "hnorm", "eh_proj"):
            found[f"{mcore}{name}.weight"] = extra[f"{prefix}{name}.weight"]
        found[f"{mcore}final_layernorm.weight"] = extra[prefix + "shared_head.norm.weight"]
    return {name: tensor.detach() for name, tensor in found.items()}


def parts_of_internvl(core: Any) -> dict[str, torch.nn.Module]:
    """Tower and projector by what Megatron's model has before their names."""
    return {f"visual.{name}.": getattr(core, name) for name in ("vision_tower", "multi_modal_projector")}


def decoder_layer(layer: Any, config: hf.PretrainedConfig) -> dict[str, torch.Tensor]:
    """A layer's weights by the names that Megatron has in the layer."""
    found = {
        "input_layernorm.weight": layer.input_layernorm.weight,
        "pre_mlp_layernorm.weight": layer.post_attention_layernorm.weight,
    }
    if hasattr(layer, "post_mlp_layernorm"):
        found["self_attention.post_layernorm.weight"] = layer.post_self_attn_layernorm.weight
        found["mlp.post_layernorm.weight"] = layer.post_mlp_layernorm.weight
    latent = hasattr(layer.self_attn, "kv_b_proj")
    attention = _latent_attention(layer.self_attn) if latent else _attention(layer.self_attn, config)
    mlp = _experts(layer.mlp) if hasattr(layer.mlp, "experts") else _mlp(layer.mlp)
    found |= {f"self_attention.{name}": tensor for name, tensor in attention.items()}
    return found | {f"mlp.{name}": tensor for name, tensor in mlp.items()}


def _attention(module: Any, config: hf.PretrainedConfig) -> dict[str, torch.Tensor]:
    found = {"linear_proj.weight": module.o_proj.weight}
    for kind in ("weight", "bias"):
        parts = [getattr(linear, kind) for linear in (module.q_proj, module.k_proj, module.v_proj)]
        if parts[0] is not None:
            grouped = [part.unflatten(0, (config.num_key_value_heads, -1)) for part in parts]
            found[f"linear_qkv.{kind}"] = torch.cat(grouped, dim=1).flatten(0, 1)
    if module.o_proj.bias is not None:
        found["linear_proj.bias"] = module.o_proj.bias
    if hasattr(module, "q_norm"):
        found["q_layernorm.weight"] = module.q_norm.weight
        found["k_layernorm.weight"] = module.k_norm.weight
    if hasattr(module, "sinks"):
        found["core_attention.softmax_offset"] = module.sinks
    return found


def _latent_attention(module: Any) -> dict[str, torch.Tensor]:
    found = {
        "linear_kv_down_proj.weight": module.kv_a_proj_with_mqa.weight,
        "kv_layernorm.weight": module.kv_a_layernorm.weight,
        "linear_kv_up_proj.weight": module.kv_b_proj.weight,
        "linear_proj.weight": module.o_proj.weight,
    }
    if module.q_lora_rank is None:
        return found | {"linear_q_proj.weight": module.q_proj.weight}
    return found | {
        "linear_q_down_proj.weight": module.q_a_proj.weight,
        "q_layernorm.weight": module.q_a_layernorm.weight,
        "linear_q_up_proj.weight": module.q_b_proj.weight,
    }


def _mlp(module: Any) -> dict[str, torch.Tensor]:
    found = {"linear_fc2.weight": module.down_proj.weight}
    if hasattr(module, "gate_up_proj"):
        return found | {"linear_fc1.weight": module.gate_up_proj.weight.unflatten(0, (2, -1))}
    found["linear_fc1.weight"] = torch.stack([module.gate_proj.weight, module.up_proj.weight])
    if module.down_proj.bias is not None:
        found["linear_fc2.bias"] = module.down_proj.bias
        found["linear_fc1.bias"] = torch.stack([module.gate_proj.bias, module.up_proj.bias])
    return found


def _experts(module: Any) -> dict[str, torch.Tensor]:
    router = module.router if hasattr(module, "router") else module.gate
    found = {"router.weight": router.weight}
    if hasattr(router, "bias"):
        found["router.bias"] = router.bias
    if hasattr(router, "e_score_correction_bias"):
        found["router.expert_bias"] = router.e_score_correction_bias
    for number in range(module.experts.num_experts):
        for name, tensor in _expert(module.experts, number).items():
            found[f"experts.local_experts.{number}.{name}"] = tensor
    shared = [getattr(module, name) for name in ("shared_expert", "shared_experts") if hasattr(module, name)]
    if shared:
        found |= {f"shared_experts.{name}": tensor for name, tensor in _mlp(shared[0]).items()}
    if hasattr(module, "shared_expert_gate"):
        found["shared_experts.gate_weight"] = module.shared_expert_gate.weight
    return found


def _expert(experts: Any, number: int) -> dict[str, torch.Tensor]:
    gate_up, down = experts.gate_up_proj[number], experts.down_proj[number]
    if not hasattr(experts, "gate_up_proj_bias"):
        return {"linear_fc1.weight": gate_up.unflatten(0, (2, -1)), "linear_fc2.weight": down}
    bias = experts.gate_up_proj_bias[number]
    return {
        "linear_fc1.weight": torch.stack([gate_up[:, 0::2].T, gate_up[:, 1::2].T]),
        "linear_fc1.bias": torch.stack([bias[0::2], bias[1::2]]),
        "linear_fc2.weight": down.T,
        "linear_fc2.bias": experts.down_proj_bias[number],
    }


def megatron_shard(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What rank `rank` of `size` holds of a whole tensor from megatron_tensors."""
    if name.startswith("visual."):
        return whole
    if "word_embeddings" in name or name.startswith("output_layer"):
        padding = whole.new_zeros(-len(whole) % size, whole.shape[1])
        return torch.cat([whole, padding]).chunk(size)[rank]
    if "linear_fc1" in name:
        return whole.chunk(size, dim=1)[rank].flatten(0, 1)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(size, dim=1)[rank]
    columns = ("linear_qkv", "linear_q_", "linear_kv_", "softmax_offset", "eh_proj")
    return whole.chunk(size)[rank] if any(part in name for part in columns) else whole
