"""One table per model family, and the lookup by model_type."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridge.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from bridge.families.glm import GLM4, GLM4_MOE
from bridge.families.gpt_oss import GPT_OSS
from bridge.families.internvl import INTERNVL
from bridge.families.llama import LLAMA, MISTRAL
from bridge.families.mixtral import MIXTRAL
from bridge.families.qwen import QWEN2, QWEN3
from bridge.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from bridge.families.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE
from bridge.families.seed_oss import SEED_OSS
from bridge.rules import Family, MegatronSpec
from configs.errors import ConfigError

FAMILIES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GLM4,
    SEED_OSS,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    GPT_OSS,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
    QWEN3_VL_MOE,
    INTERNVL,
)


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ConfigError with the list of supported types, but without the path."""
    model_type = hf_config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ConfigError(f"model_type {model_type!r} is not supported; supported are: {supported}")


def read_hf_config(directory: Path) -> dict[str, Any]:
    """config.json with the defaults of its model type filled in. Raises ConfigError naming the file."""
    from transformers import AutoConfig

    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a JSON object")
    with _naming(path):
        family_of(raw)
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True).to_dict()
    # transformers checks each field with code of its own; any of it may raise anything.
    except Exception as error:
        raise ConfigError(f"{path}: transformers does not accept it: {error!r}") from error


def spec_of(directory: Path) -> tuple[Family, MegatronSpec]:
    """Family and Megatron's view of a model directory. Raises ConfigError naming the file and the key."""
    config = read_hf_config(directory)
    family = family_of(config)
    with _naming(directory / "config.json"):
        return family, family.megatron(config)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Families know keys and values; this puts the file before what they say about them."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{path}: {error} is missing") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: sizes that make no model: {error}") from error
