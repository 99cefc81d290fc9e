"""Which models vLLM computes as transformers does, and which of them can take new weights while they run."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from actors.model_source import Contents, ModelSource
from bridge.rules import VisionSpec
from bridge.transport.registry import IGNORED_ADAPTERS, SEEING
from bridge.vision import modules_of
from configs.errors import ConfigError

_DEEPSEEK_V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""What vLLM 0.32 reads from the config of a DeepSeek-V3, and transformers takes for granted."""

_MAX_VOCABULARY = 258048


def check_routing(directory: Path, hf_config: Mapping[str, Any]) -> None:
    """Raises ConfigError naming the key of config.json by which vLLM would choose other experts."""
    path, model_type = directory / "config.json", hf_config.get("model_type")
    if model_type == "deepseek_v3":
        wrong = {key: value for key, value in _DEEPSEEK_V3.items() if hf_config.get(key) != value}
        if wrong:
            lines = ", ".join(f'"{key}": "{value}"' for key, value in wrong.items())
            raise ConfigError(f"{path}: vLLM routes a deepseek_v3 wrongly without these keys; add {lines}")
    text = hf_config.get("text_config") or {}
    if model_type == "qwen3_vl_moe" and text.get("norm_topk_prob") is not True:
        raise ConfigError(
            f'{path}: vLLM needs to be told what transformers takes for granted; add "norm_topk_prob": true to '
            "its text_config"
        )
    groups, chosen = hf_config.get("n_group") or 1, hf_config.get("topk_group") or 1
    if model_type == "deepseek_v2" and hf_config.get("topk_method") == "greedy" and groups != chosen:
        raise ConfigError(
            f"{path}: n_group is {groups} with topk_method greedy: vLLM limits experts to groups all the same, "
            "transformers does not; set n_group and topk_group to 1"
        )


def language_config(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the language model, which has a part of its own where there is more than that."""
    return hf_config.get("text_config") or hf_config


def check_engines(directory: Path, hf_config: Mapping[str, Any], tensor_parallel_size: int) -> None:
    """Raises ConfigError when engines of a run with this config.json cannot do their part in it."""
    if hf_config["model_type"] == "gpt_oss":
        raise ConfigError(
            f"{directory / 'config.json'}: model_type gpt_oss cannot be trained by grpo: vLLM 0.32 cannot load "
            "its experts and sinks into a running engine; sft and export work"
        )
    check_sight(directory, hf_config)
    check_routing(directory, hf_config)
    check_workers(hf_config, tensor_parallel_size, "rollout.tensor_parallel_size")


def check_sight(directory: Path, hf_config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a model that sees which engines cannot show pictures."""
    architectures = hf_config.get("architectures") or ()
    if hf_config.get("vision_config") and not set(architectures) <= SEEING.keys():
        raise ConfigError(
            f"{directory / 'config.json'}: architectures is {list(architectures)}; of models that see engines run "
            f"{', '.join(SEEING)}; sft and export work for others"
        )


def check_workers(hf_config: Mapping[str, Any], workers: int, option: str) -> None:
    """Raises ConfigError naming the option when so many workers cannot share the model's attention."""
    heads = language_config(hf_config)["num_attention_heads"]
    if heads % workers:
        raise ConfigError(f"{option}: {workers} does not divide the model's {heads} attention heads")


def check_not_quantized(source: ModelSource, hf_config: Mapping[str, Any], contents: Contents) -> None:
    """Raises ConfigError when engines of the source would be quantized: they cannot take new weights."""
    if contents.quantized:
        raise ConfigError(
            f"{source.directory}: is quantized, so its engines would be too, and could not take the "
            "trainer's weights; make it BF16 first: bascule export --to_mcore true, then --to_hf true"
        )
    if hf_config.get("quantization_config"):
        raise ConfigError(
            f"{source.directory / 'config.json'}: quantization_config would make the engines quantized, so that "
            "they could not take the trainer's weights, which are not; give a copy of the directory without "
            "that key"
        )


def check_adapter_modules(
    hf_config: Mapping[str, Any],
    modules: Collection[str],
    device: str = "cpu",
    *,
    vision: VisionSpec | None = None,
) -> None:
    """Raises ConfigError naming one of the adapted `modules` (paths in HF) that vLLM would not adapt, or wrongly.

    `vision` is that of a model that sees.

    Engines can have the trainer's merged weights instead, so the message says how.
    """
    of_pictures = re.compile(modules_of(vision, ("vit", "aligner"))) if vision is not None else None
    for module in modules:
        leaf = module.rpartition(".")[2]
        if of_pictures is not None and of_pictures.fullmatch(module):
            _refuse_module(module, "vLLM 0.32 adapts only the language model of one that sees")
        if ".experts." in module and device == "cpu":
            _refuse_module(module, "vLLM 0.32 cannot adapt experts on CPU")
        if leaf in IGNORED_ADAPTERS:
            _refuse_module(module, "vLLM 0.32 ignores that")
    if language_config(hf_config)["vocab_size"] > _MAX_VOCABULARY and any(
        m.endswith("lm_head") for m in modules
    ):
        _refuse_module("lm_head", f"vLLM 0.32 adapts it up to a vocabulary of {_MAX_VOCABULARY}")


def _refuse_module(module: str, why: str) -> NoReturn:
    raise ConfigError(
        f"target_modules: {module} is adapted, and {why}; leave it out, or set rollout.vllm_enable_lora to false, "
        "so that engines get merged weights"
    )
