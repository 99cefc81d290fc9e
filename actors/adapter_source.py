"""Where a run's LoRA adapter comes from: new, a PEFT directory, or a Megatron torch_dist checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from actors.checkpoint_files import (
    SourceTensor,
    checkpoint_root,
    find_iteration,
    read_source_index,
    write_source_index,
)
from bridge.adapter_bridge import AdapterBridge, check_adapter, leaf_names, target_names
from bridge.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ALL_LINEAR,
    AdapterConfig,
    read_adapter_config,
)
from bridge.checkpoint import CheckpointReader
from bridge.model_bridge import ModelBridge
from bridge.plan import Plan, TensorInfo
from bridge.safetensors_file import DTYPE_NAMES, DTYPES
from bridge.side_files import LATEST
from bridge.vision import modules_of
from configs.errors import ConfigError
from configs.tuner import TunerConfig
from configs.vision import VisionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSource:
    """An adapter's config and, unless it is a new one, its tensors and where they are."""

    config: AdapterConfig
    modules: frozenset[str]
    """Hugging Face modules that it adapts."""
    tensors: Mapping[str, TensorInfo] | None = None
    directory: Path | None = None
    """Of PEFT."""
    mcore: Path | None = None
    """Of Megatron."""

    @property
    def is_new(self) -> bool:
        """Whether it adds nothing yet."""
        return self.tensors is None

    @property
    def dtype(self) -> torch.dtype | None:
        """The one type that holds every value of it; None of a new one."""
        if self.tensors is None:
            return None
        dtypes = {info.dtype for info in self.tensors.values()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def largest_rank(self) -> int:
        """Of all adapted modules."""
        return max(self.config.rank_of(module) for module in self.modules)

    @property
    def leaves(self) -> list[str]:
        """Last names of the modules."""
        return leaf_names(self.modules)

    def bridge(self, base: ModelBridge) -> AdapterBridge:
        """The way between it and models of the shape of `base`."""
        return AdapterBridge(base, self.config, tensors=self.tensors, source=self.directory)

    def peft_config(self, base_model: Path) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return self.config.to_json(
            str(base_model), sorted({name.rpartition(".")[2] for name in self.modules})
        )


def find_adapter(tuner: TunerConfig, base: ModelBridge, vision: VisionConfig) -> AdapterSource | None:
    """The adapter that a run trains, checked against its model; None when all of the model is trained.

    A new one is of those parts of a model that sees which `vision` does not freeze. Raises ConfigError naming the
    option, or the file and what does not fit.
    """
    if tuner.tuner_type == "full":
        return None
    if tuner.adapters is not None:
        return _with_dropout(read_adapter(tuner.adapters, base, "tuner.adapters"), tuner)
    if tuner.mcore_adapter is not None:
        return _with_dropout(read_mcore_adapter(tuner.mcore_adapter, base, "tuner.mcore_adapter"), tuner)
    names = tuner.target_modules
    assert tuner.lora_dropout is not None, "the algorithm's, as the run's config was checked"
    config = AdapterConfig(
        r=tuner.lora_rank,
        lora_alpha=tuner.lora_alpha,
        lora_dropout=tuner.lora_dropout,
        use_rslora=tuner.use_rslora,
        target_modules=ALL_LINEAR if names == (ALL_LINEAR,) else names,
        modules_to_save=tuner.modules_to_save,
        # Names may be those of linears in other parts too (gate_proj of Qwen2.5-VL's tower).
        exclude_modules=_frozen_modules(base, vision),
    )
    try:
        modules = check_adapter(base, config, None, "")
    except ConfigError as error:
        raise ConfigError(f"tuner.{error}") from error
    if base.spec.vision is not None:
        config = replace(config, target_modules=tuple(target_names(base, config, modules)))
    return AdapterSource(config=config, modules=modules)


def _frozen_modules(base: ModelBridge, vision: VisionConfig) -> str | tuple[str, ...]:
    """What of a model that sees has no adapters, as a regular expression."""
    frozen = vision.frozen_parts
    return modules_of(base.spec.vision, frozen) if base.spec.vision is not None and frozen else ()


def _with_dropout(source: AdapterSource, tuner: TunerConfig) -> AdapterSource:
    """With the dropout that the run trains with; it is no part of what the adapter computes."""
    if tuner.lora_dropout is None:
        return source
    return replace(source, config=replace(source.config, lora_dropout=tuner.lora_dropout))


def read_adapter(directory: Path, base: ModelBridge, option: str) -> AdapterSource:
    """A PEFT adapter of the model. Raises ConfigError naming the option, or the file and what does not fit."""
    directory = directory.resolve()
    if not (directory / ADAPTER_CONFIG).is_file() and (directory / LATEST).is_file():
        head, dot, _ = option.rpartition(".")
        raise ConfigError(
            f"{option}: {directory} is a Megatron torch_dist checkpoint; give it as --{head}{dot}mcore_adapter"
        )
    if not directory.is_dir():
        raise ConfigError(f"{option}: there is no directory {directory}")
    config = read_adapter_config(directory)
    with CheckpointReader(directory, ADAPTER_WEIGHTS) as reader:
        tensors = dict(reader.tensors)
    modules = check_adapter(base, config, tensors, str(directory / ADAPTER_WEIGHTS))
    return AdapterSource(config=config, modules=modules, tensors=tensors, directory=directory)


def read_mcore_adapter(directory: Path, base: ModelBridge, option: str) -> AdapterSource:
    """An adapter in a torch_dist checkpoint that this project wrote. Raises ConfigError like read_adapter."""
    directory = directory.resolve()
    try:
        find_iteration(directory)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from error
    root = checkpoint_root(directory)
    config, index = read_adapter_config(root), read_source_index(root)
    if index is None:
        raise ConfigError(f"{option}: {root} has no list of the adapter's tensors; it was not written here")
    tensors = {
        each.name: TensorInfo(name=each.name, dtype=DTYPES[each.dtype], shape=each.shape) for each in index
    }
    modules = check_adapter(base, config, tensors, str(root))
    return AdapterSource(config=config, modules=modules, tensors=tensors, mcore=directory)


def write_adapter_beside(directory: Path, source: AdapterSource, base: Path, plan: Plan) -> None:
    """Put what read_mcore_adapter needs beside a torch_dist checkpoint."""
    (directory / ADAPTER_CONFIG).write_text(json.dumps(source.peft_config(base), indent=2) + "\n")
    write_source_index(
        directory,
        [
            SourceTensor(name=info.name, dtype=DTYPE_NAMES[info.dtype], shape=info.shape)
            for info in plan.tensors
        ],
    )


def fill_adapter(
    bridge: AdapterBridge,
    source: AdapterSource,
    seed: int,
    chunks: list[Any],
    dtype: torch.dtype | None = None,
) -> tuple[str, ...]:
    """Attach the adapter to this rank's model and fill it. Returns names of tensors with NaN or infinities.

    It is of `dtype`, by default of the model's type, in which it is trained.
    """
    from actors.megatron_adapter_checkpoint import load_adapter
    from actors.megatron_lora import adapters_of, attach

    attach(chunks, bridge.targets(chunks), seed=seed, trainable=bridge.saved(chunks))
    for adapters in adapters_of(chunks):
        adapters.to(dtype)
    if source.mcore is not None:
        load_adapter(chunks, source.mcore)
    elif source.directory is not None:
        return bridge.load(chunks).not_finite
    return ()
