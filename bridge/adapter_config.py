"""A PEFT adapter's adapter_config.json: read, checked, matched against module names, and written again."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import ConfigError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"

# Set, these change what an adapter computes in a way that is not done here.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "ensure_weight_tying",
)
# These say how an adapter was made, or where it is to run.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
# With any other the weights of the base model were changed as well.
_KNOWN_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What PEFT's LoraConfig says about which modules are adapted, and how. Names are PEFT's."""

    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...]
    """Ends of module names; a string is a regular expression, or `all-linear`."""
    lora_dropout: float = 0.0
    use_rslora: bool = False
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained and stored whole."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    stored: Mapping[str, Any] = field(default_factory=dict)
    """All keys of the file it was read from, to be written again."""

    def rank_of(self, module: str) -> int:
        """Rank of an adapted module."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by: alpha / r, with use_rslora alpha / sqrt(r)."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.lora_alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether a module that could be adapted is, as PEFT decides it; `all-linear` is left to the caller."""
        if self.is_excluded(module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules == ALL_LINEAR or re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        if not any(module.endswith(f".{name}") for name in self.target_modules):
            return False
        return self.layers_to_transform is None or self._layer_of(module) in self.layers_to_transform

    def is_excluded(self, module: str) -> bool:
        """Whether the module is named by exclude_modules or modules_to_save."""
        if isinstance(self.exclude_modules, str):
            if re.fullmatch(self.exclude_modules, module):
                return True
        elif any(module == name or module.endswith(f".{name}") for name in self.exclude_modules):
            return True
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save)

    def saves(self, module: str) -> bool:
        """Whether the module is trained and stored whole. As in PEFT a name is any end: `norm` is every norm."""
        return module.endswith(self.modules_to_save)

    def _layer_of(self, module: str) -> int | None:
        for pattern in self.layers_pattern or (r"[^.]*",):
            match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if match is not None:
                return int(match[1])
        return None

    def to_json(self, base_model: str, target_modules: Sequence[str]) -> dict[str, Any]:
        """The content of adapter_config.json. `target_modules` are written for `all-linear`."""
        listed = self.target_modules if self.target_modules != ALL_LINEAR else tuple(sorted(target_modules))
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            **self.stored,
            "r": self.r,
            # vLLM wants a whole number to be written as one.
            "lora_alpha": int(self.lora_alpha)
            if self.lora_alpha == int(self.lora_alpha)
            else self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": listed if isinstance(listed, str) else list(listed),
            "exclude_modules": _as_json(self.exclude_modules),
            "modules_to_save": _as_json(self.modules_to_save),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "layers_to_transform": _as_json(self.layers_to_transform or ()),
            "layers_pattern": _as_json(self.layers_pattern),
        }


def read_adapter_config(directory: Path) -> AdapterConfig:
    """The config of the adapter in `directory`. Raises ConfigError naming the file, and the key that is wrong."""
    path = directory / ADAPTER_CONFIG
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; is this a PEFT adapter?") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold a JSON object, is {type(found).__name__}")
    try:
        return parse_adapter_config(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_adapter_config(found: Mapping[str, Any]) -> AdapterConfig:
    """The same from the file's content. Raises ConfigError naming the key."""
    _refuse(found)
    rank, alpha = found.get("r", 8), found.get("lora_alpha", 8)
    patterns = {name: dict(found.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    for key, value in (("r", rank), *patterns["rank_pattern"].items()):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key}: a rank must be a whole number above 0, is {value!r}")
    targets = found.get("target_modules")
    if not targets:
        raise ConfigError("target_modules: names no module")
    layers = found.get("layers_to_transform")
    return AdapterConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_names(targets),
        lora_dropout=found.get("lora_dropout") or 0.0,
        use_rslora=bool(found.get("use_rslora")),
        exclude_modules=_names(found.get("exclude_modules") or ()),
        modules_to_save=tuple(found.get("modules_to_save") or ()),
        layers_to_transform=None
        if layers is None
        else (layers,)
        if isinstance(layers, int)
        else tuple(layers),
        layers_pattern=_as_tuple(found.get("layers_pattern") or ()),
        stored=dict(found),
        **patterns,
    )


def _refuse(found: Mapping[str, Any]) -> None:
    kind = found.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"peft_type: {kind!r} is not supported, only LORA")
    for key in _UNSUPPORTED:
        if found.get(key):
            raise ConfigError(
                f"{key}: {found[key]!r} is not supported; merge the adapter with peft, and start from that"
            )
    if found.get("bias", "none") != "none":
        raise ConfigError(f"bias: {found['bias']!r} is not supported, only 'none'")
    init = found.get("init_lora_weights", True)
    if init not in _KNOWN_INITS:
        raise ConfigError(
            f"init_lora_weights: {init!r} changes the base model as well; convert the adapter to plain LoRA with "
            "peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {*AdapterConfig.__dataclass_fields__, *_UNSUPPORTED, *_WITHOUT_EFFECT}
    known |= {"peft_type", "bias", "init_lora_weights"}
    unknown = [key for key, value in found.items() if key not in known and value]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: not known here, so it is not known what the adapter computes"
        )


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that fits the end of the name, as PEFT chooses it."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _as_json(value: str | Sequence[Any]) -> Any:
    return value if isinstance(value, str) else list(value) or None
