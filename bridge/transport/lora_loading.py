"""Tensors of a PEFT adapter become the adapter of a vLLM worker.

vLLM 0.32 loads adapters from directories only, and leaves out silently what it has no place for. Here they come
from memory, and nothing is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from vllm.lora.layers import BaseLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.linear import QKVParallelLinear

from bridge.adapter_config import AdapterConfig
from bridge.transport.errors import TransportError
from bridge.transport.registry import IGNORED_ADAPTERS

# One adapter for the whole life of an engine; a new version takes the place of the last.
_ADAPTER_ID = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """A and B of a module as far as they came, each with the name it came under."""

    module: str
    """As PEFT names it."""
    halves: dict[Literal["A", "B"], tuple[str, torch.Tensor]] = field(default_factory=dict)


def adapter_request() -> LoRARequest:
    """What every request of an engine with an adapter carries."""
    # The path is only read when the worker has no adapter with this id, and then it is the error that shows.
    return LoRARequest("policy", _ADAPTER_ID, "/adapter-comes-over-the-weight-sync")


def manager_of(model: Any) -> LoRAModelManager:
    """What vLLM keeps adapters of this model in. Raises TransportError when the engine takes none."""
    # vLLM sets it on the model only if it was started with LoRA.
    manager = getattr(model, "lora_manager", None)
    if manager is None:
        raise TransportError(
            "an adapter is to be received, but this engine was started without a max_lora_rank"
        )
    return manager


def build_adapter(
    manager: LoRAModelManager, tensors: Mapping[str, torch.Tensor], config: AdapterConfig
) -> LoRAModel:
    """The adapter that vLLM makes of all its tensors by PEFT's names; nothing in the engine changes.

    Raises TransportError naming the tensor for which vLLM has no place, which lacks its other half, or whose
    shape is not that of its module and rank.
    """
    places = _places(manager)
    pairs: dict[str, _Pair] = {}
    for name, tensor in tensors.items():
        module, place, is_a = _parse(manager, name)
        if place not in places and not _is_fused(manager, place):
            raise TransportError(
                f"vLLM has no place for {name}: {module} is no module of its model, or one that it cannot adapt"
            )
        pair = pairs.setdefault(place, _Pair(module=module))
        pair.halves["A" if is_a else "B"] = (name, tensor)
    _require_whole(manager, pairs)
    loras: dict[str, LoRALayerWeights] = {}
    for place, pair in pairs.items():
        if place in places:
            loras[place] = _layer(*places[place], place, pair, config)
        else:
            loras |= _spread(manager, place, pair, config)
    return LoRAModel(_ADAPTER_ID, max(lora.rank for lora in loras.values()), loras)


def activate(manager: LoRAModelManager, adapter: LoRAModel | None) -> None:
    """Let requests with the adapter's id use this one instead of the last; None changes nothing in the base."""
    manager.remove_adapter(_ADAPTER_ID)
    if adapter is None:
        adapter = manager.create_dummy_lora(_ADAPTER_ID, 1, manager.model.embedding_modules)
    manager.add_adapter(adapter)
    manager.activate_adapter(_ADAPTER_ID)


def scaled(lora_b: torch.Tensor, module: str, config: AdapterConfig) -> torch.Tensor:
    """B times the scale of its module. vLLM is given scale 1, so that ranks and scales have one meaning here.

    Computed in float32: in the adapter's own type a second rounding would come on top.
    """
    return lora_b.float() * config.scale_of(module)


def _parse(manager: LoRAModelManager, name: str) -> tuple[str, str, bool]:
    """Module as PEFT names it, module as vLLM names it, and whether it is A."""
    renamed = getattr(manager.model, "hf_to_vllm_mapper", None)
    try:
        module, is_a = parse_fine_tuned_lora_name(name)
        place, _ = parse_fine_tuned_lora_name(name, renamed.get_rename_mapper() if renamed else None)
    except ValueError as error:
        raise TransportError(f"vLLM has no place for {name}: it is neither A nor B of an adapter") from error
    return module, place, is_a


def _places(manager: LoRAModelManager) -> dict[str, tuple[BaseLayerWithLoRA, int | None]]:
    """Every module with an adapter, by vLLM's name before packing: its layer, and its number in that."""
    found: dict[str, tuple[BaseLayerWithLoRA, int | None]] = {}
    for name, layer in manager.modules.items():
        if name.rpartition(".")[2] in IGNORED_ADAPTERS:
            continue
        packed = manager.packed_modules.get(name)
        if packed is None:
            found[name] = (layer, None)
        else:
            found |= {part: (layer, number) for number, part in enumerate(packed)}
    return found


def _is_fused(manager: LoRAModelManager, place: str) -> bool:
    """Whether the model itself has as one module what vLLM has as parts, like gate_up_proj of GLM-4."""
    return place in manager.packed_modules and not place.endswith(".experts")


def _require_whole(manager: LoRAModelManager, pairs: Mapping[str, _Pair]) -> None:
    for pair in pairs.values():
        if len(pair.halves) == 1:
            ((name, _),) = pair.halves.values()
            raise TransportError(f"{name} came without the other half of its adapter")
    for name, packed in manager.packed_modules.items():
        # Of q, k and v some may be absent, of the experts' matrices none.
        missing = [part for part in packed if part not in pairs]
        if name.endswith(".experts") and 0 < len(missing) < len(packed):
            raise TransportError(
                f"vLLM adapts all matrices of {name} or none, and there is no adapter for {missing[0]}"
            )


def _spread(
    manager: LoRAModelManager, place: str, pair: _Pair, config: AdapterConfig
) -> dict[str, LoRALayerWeights]:
    """The adapter of a fused module as one for each of vLLM's parts, which have A in common."""
    layer, parts = manager.modules[place], manager.packed_modules[place]
    base: Any = layer.base_layer
    whole = _layer(layer, None, place, pair, config)
    rows = whole.lora_b.split(base.output_sizes)
    return {
        part: LoRALayerWeights(part, whole.rank, whole.rank, whole.lora_a, lora_b, scaling=1)
        for part, lora_b in zip(parts, rows, strict=True)
    }


def _layer(
    layer: BaseLayerWithLoRA, number: int | None, place: str, pair: _Pair, config: AdapterConfig
) -> LoRALayerWeights:
    (name_a, a), (name_b, b) = pair.halves["A"], pair.halves["B"]
    rank = config.rank_of(pair.module)
    inputs, outputs = _sizes(layer, number)
    for name, tensor, expected in ((name_a, a, (rank, inputs)), (name_b, b, (outputs, rank))):
        if any(want not in (None, got) for got, want in zip(tensor.shape, expected, strict=True)):
            shape = ", ".join("any" if size is None else str(size) for size in expected)
            raise TransportError(f"{name} is {list(tensor.shape)}, must be [{shape}] in vLLM")
    dtype = layer.lora_a_stacked[0].dtype
    # vLLM keeps adapters in host memory and copies from there.
    lora_a = a.to(device="cpu", dtype=dtype)
    lora_b = scaled(b, pair.module, config).to(device="cpu", dtype=dtype)
    return LoRALayerWeights(place, rank, rank, lora_a, lora_b, scaling=1)


def _sizes(layer: BaseLayerWithLoRA, number: int | None) -> tuple[int | None, int | None]:
    """Inputs and outputs of the module over all workers; None where vLLM does not say."""
    if isinstance(layer, LogitsProcessorWithLoRA):
        return layer.hidden_size, layer.vocab_size
    base: Any = layer.base_layer
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        return base.org_vocab_size, base.embedding_dim
    if number is None:
        return base.input_size, base.output_size
    if isinstance(base, QKVParallelLinear):
        heads = base.total_num_heads if number == 0 else base.total_num_kv_heads
        return base.input_size, heads * (base.head_size if number < 2 else base.v_head_size)
    if "output_sizes" in vars(base):
        return base.input_size, base.output_sizes[number]
    return None, None
