"""Loading of weights as a program of copies, recorded from vLLM's own loaders.

In the first update vLLM loads as it always does, and is watched. A layer into which its loaders only copied, each
element once, is from then on filled by the same copies, without the loaders; every other layer, and every tensor
that left no copy, goes through vLLM's loaders as before. Written for vLLM 0.32, as vllm_fixes.py is.
"""

import functools
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import (
    SKIP_MODULES,
    SKIP_TENSORS,
    materialize_layer,
    restore_layer_on_meta,
)
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers
from vllm.platforms import current_platform

from bridge.sync_plan import unit_of
from bridge.transport.copies import Copy, CopyWatch, Place, fills_once, same_bits
from bridge.transport.errors import TransportError

# Any: its functions find each other as the module's attributes.
_LAYERWISE: Any = layerwise

Weights = Sequence[tuple[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Layout":
        """Of this tensor."""
        return cls(shape=tuple(tensor.shape), strides=tensor.stride(), dtype=tensor.dtype)


@dataclass(kw_only=True, slots=True)
class ProgramLayer:
    """A layer that copies fill: in its live tensors, or anew and then processed by vLLM."""

    name: str
    module: torch.nn.Module
    live: dict[str, tuple[torch.Tensor, int]]
    """Tensors that are written where they are, with the address of their memory; empty for one made anew."""
    layouts: dict[str, Layout]
    """Of its tensors, when they are filled."""
    got: int = 0
    """Elements of this update."""

    def fits(self) -> bool:
        """Whether the layer is as it was when its copies were recorded."""
        if self.live:
            return needs_no_processing(self.module) and all(
                self.module._parameters.get(name) is tensor
                and tensor.data_ptr() == address
                and Layout.of(tensor) == self.layouts[name]
                for name, (tensor, address) in self.live.items()
            )
        return all(
            tensor is not None and Layout.of(tensor) == self.layouts[name]
            for name, tensor in _to_fill(self.module, self.layouts).items()
        )

    def tensor(self, name: str) -> torch.Tensor:
        """The one to fill; raises TransportError when it is not as recorded."""
        if not self.live:
            materialize_layer(self.module, layerwise.get_layerwise_info(self.module))
        tensor = self.module._parameters[name]
        if tensor is None or Layout.of(tensor) != self.layouts[name]:
            raise TransportError(f"{self.name}.{name} is not what vLLM's loader filled before")
        return tensor.data


class LoadProgram:
    """What one engine's worker does with the tensors of an update, after one that it has watched."""

    def __init__(
        self, model: torch.nn.Module, layers: Iterable[ProgramLayer], copies: Mapping[str, Sequence[Copy]]
    ) -> None:
        self._model = model
        self._layers = {layer.name: layer for layer in layers}
        self._copies = copies
        self._modules = dict(model.named_modules())
        self._expected: dict[str, int] = {}
        for copy in (copy for each in copies.values() for copy in each):
            self._expected[copy.place.layer] = self._expected.get(copy.place.layer, 0) + copy.numel
        self._views = {
            copy: copy.put.of(self._layers[copy.place.layer].tensor(copy.place.tensor))
            for each in copies.values()
            for copy in each
            if self._layers[copy.place.layer].live
        }

    @property
    def tensors(self) -> Collection[str]:
        """Names of the tensors that are copied."""
        return self._copies.keys()

    @property
    def live_layers(self) -> list[str]:
        """Layers that are written where they are."""
        return [layer.name for layer in self._layers.values() if layer.live]

    @property
    def remade_layers(self) -> list[str]:
        """Layers that are filled anew, and processed by vLLM."""
        return [layer.name for layer in self._layers.values() if not layer.live]

    def fits(self) -> bool:
        """Whether model and memory are as they were when the program was recorded."""
        modules = dict(self._model.named_modules())
        return (
            modules.keys() == self._modules.keys()
            and all(modules[name] is module for name, module in self._modules.items())
            and all(layer.fits() for layer in self._layers.values())
        )

    def open(self) -> None:
        """Begin an update: what is not written in place waits for weights, as in vLLM's layerwise reload."""
        live = {layer.module for layer in self._layers.values() if layer.live}
        for layer in self._layers.values():
            layer.got = 0
        for module in self._modules.values():
            if module not in live and (module._parameters or is_deferred_attention_layer(module)):
                _open(module)

    def load(self, weights: Weights) -> list[tuple[str, torch.Tensor]]:
        """Copy; returns those that vLLM's loaders have to take."""
        left: list[tuple[str, torch.Tensor]] = []
        for name, tensor in weights:
            copies = self._copies.get(name)
            if copies is None:
                left.append((name, tensor))
                continue
            for copy in copies:
                self._run(copy, tensor)
        return left

    def incomplete(self, units: Collection[str] | None) -> list[str]:
        """Layers that have not got all that their program writes, as `name (elements of all)`.

        With `units`, all that these units write.
        """
        expected = self._expected
        if units is not None:
            expected = dict.fromkeys(expected, 0)
            for name, copies in self._copies.items():
                if unit_of(name) in units:
                    for copy in copies:
                        expected[copy.place.layer] += copy.numel
        return [
            f"{name} ({self._layers[name].got} of {numel})"
            for name, numel in expected.items()
            if self._layers[name].got != numel
        ]

    def _run(self, copy: Copy, tensor: torch.Tensor) -> None:
        layer = self._layers[copy.place.layer]
        view = self._views[copy] if layer.live else copy.put.of(layer.tensor(copy.place.tensor))
        view.copy_(copy.taken.of(tensor))
        layer.got += copy.numel
        if not layer.live:
            info = layerwise.get_layerwise_info(layer.module)
            info.load_numel = layer.got
            if layer.got == self._expected[layer.name]:
                _LAYERWISE._layerwise_process(layer.module, info)


@dataclass(kw_only=True)
class LoadRecorder:
    """Watches an update of all weights; made after it was opened, before the first tensor."""

    model: torch.nn.Module
    _watch: CopyWatch = field(default_factory=CopyWatch)
    _layouts: dict[Place, Layout] = field(default_factory=dict[Place, Layout])
    _handed: list[str] = field(default_factory=list[str])
    _kept: list[tuple[str, torch.Tensor]] = field(default_factory=list[tuple[str, torch.Tensor]])

    def __post_init__(self) -> None:
        self._names = {module: name for name, module in self.model.named_modules()}
        # What a reload does not put aside is written by loaders where it is; some of it belongs to two layers.
        self._first_of: dict[Place, Place] = {}
        seen: dict[torch.Tensor, Place] = {}
        for module, name in self._names.items():
            for tensor, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    place = Place(layer=name, tensor=tensor)
                    self._first_of[place] = seen.setdefault(parameter, place)
        self._in_place = [(place, parameter) for parameter, place in seen.items()]

    @contextmanager
    def watching(self, weights: Weights = ()) -> Generator[None]:
        """In the body vLLM loads these weights, or finishes the update."""
        self._handed += [name for name, _ in weights]
        sources = [*self._kept, *weights]
        process, count = _LAYERWISE._layerwise_process, _LAYERWISE.get_numel_loaded
        _LAYERWISE._layerwise_process = functools.partial(self._process, process, sources)
        _LAYERWISE.get_numel_loaded = functools.partial(self._count, count)
        try:
            with self._watch, self._watch.watching(sources, self._in_place):
                yield
        finally:
            _LAYERWISE._layerwise_process, _LAYERWISE.get_numel_loaded = process, count
        given = dict(sources)
        for place, tensor in self._in_place:
            self._verify(place, tensor, given)
        self._kept = self._waiting(sources)

    def program(self) -> LoadProgram | None:
        """For later updates, after this one was finished; None where no layer can be filled by copies."""
        if self._watch.read:
            return None
        layers = [layer for name, layer in self.model.named_modules() if self._is_known(name, layer)]
        found = {
            self._names[layer]: _as_program(self._names[layer], layer, self._layouts) for layer in layers
        }
        known = {name: layer for name, layer in found.items() if layer is not None}
        by_source: dict[str, list[Copy]] = {}
        for copies in self._watch.copies.values():
            for copy in copies:
                by_source.setdefault(copy.source, []).append(copy)
        # A tensor goes one way: one that some other layer needs too is left to vLLM, and so are its layers.
        while True:
            copied = {
                source: copies
                for source, copies in by_source.items()
                if all(copy.place.layer in known for copy in copies)
            }
            lost = {copy.place.layer for source in by_source.keys() - copied for copy in by_source[source]}
            if not lost & known.keys():
                break
            known = {name: layer for name, layer in known.items() if name not in lost}
        return LoadProgram(self.model, known.values(), copied) if copied else None

    def _count(self, count: Callable[..., tuple[int, object]], *arguments: Any) -> tuple[int, object]:
        """Whatever a loader writes here it writes again when its layer is processed."""
        with self._watch.looking_away():
            return count(*arguments)

    def _process(
        self,
        process: Callable[[torch.nn.Module, LayerReloadingInfo], None],
        sources: Weights,
        layer: torch.nn.Module,
        info: LayerReloadingInfo,
    ) -> None:
        """Load a layer as vLLM does, look at what was written before it is processed, and go on as vLLM does."""
        name = self._names[layer]
        with self._watch.looking_away():
            materialize_layer(layer, info)
        targets = [
            (self._first_of.get(place := Place(layer=name, tensor=tensor), place), parameter)
            for tensor, parameter in layer._parameters.items()
            if parameter is not None
        ]
        with self._watch.watching(sources, targets, of_loader=True):
            for tensor, arguments in info.loaded_weights:
                parameter = getattr(layer, tensor)
                arguments.arguments["param"] = parameter
                layerwise._get_original_loader(parameter)(*arguments.args, **arguments.kwargs)
        with self._watch.looking_away():
            given = dict(sources)
            for place, parameter in targets:
                self._verify(place, parameter, given)
            process(layer, info)

    def _verify(self, place: Place, tensor: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> None:
        """Note the tensor if the copies, made on these sources, give just what is in it now."""
        copies = self._watch.copies.get(place, {})
        fills = self._watch.fills.get(place, {})
        if place in self._layouts or not copies or any(copy.source not in sources for copy in copies):
            return
        if fills_once(tensor, [*(copy.put for copy in copies), *fills]) and all(
            same_bits(copy.put.of(tensor.data), copy.taken.of(sources[copy.source]).to(tensor.dtype))
            for copy in copies
        ):
            self._layouts[place] = Layout.of(tensor)

    def _waiting(self, sources: Weights) -> list[tuple[str, torch.Tensor]]:
        """Sources of layers that vLLM has not processed yet: it holds their memory as well."""
        kept: dict[str, torch.Tensor] = {}
        with self._watch, self._watch.watching(sources, ()):
            for layer in self._names:
                for _, arguments in layerwise.get_layerwise_info(layer).loaded_weights:
                    for value in arguments.arguments.values():
                        found = self._watch.source_of(value) if isinstance(value, torch.Tensor) else None
                        kept |= dict([found]) if found else {}
        return list(kept.items())

    def _is_known(self, name: str, layer: torch.nn.Module) -> bool:
        """Whether all its parameters were filled by copies that may be made again."""
        own = [Place(layer=name, tensor=t) for t, p in layer._parameters.items() if p is not None]
        places = [self._first_of.get(place, place) for place in own]
        return (
            bool(places)
            and not is_deferred_attention_layer(layer)
            and type(layer).__name__ not in SKIP_MODULES
            and all(place in self._layouts and place not in self._watch.refused for place in places)
            and (needs_no_processing(layer) or not any(place in self._watch.fills for place in places))
        )


def needs_no_processing(layer: torch.nn.Module) -> bool:
    """Whether vLLM's processing after loading leaves the layer and its tensors as they are."""
    method = getattr(layer, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase):
        return True
    if type(method) is UnquantizedEmbeddingMethod:
        # On CPU finish_weight_update packs all of them again (repack_tied_lm_head).
        return True
    if type(method) is not UnquantizedLinearMethod:
        return False
    if not current_platform.is_cpu():
        return current_platform.is_cuda_alike()
    # A packed copy would be in its closure.
    multiply = getattr(layer, "cpu_linear", None)
    return multiply is not None and getattr(multiply, "__closure__", None) is None


def _as_program(name: str, layer: torch.nn.Module, layouts: Mapping[Place, Layout]) -> ProgramLayer | None:
    own = {place.tensor: layout for place, layout in layouts.items() if place.layer == name}
    live: dict[str, tuple[torch.Tensor, int]] = {}
    if needs_no_processing(layer):
        live = {t: (p, p.data_ptr()) for t, p in layer._parameters.items() if p is not None and t in own}
    found = ProgramLayer(name=name, module=layer, live=live, layouts=own)
    return found if found.fits() else None


def _to_fill(layer: torch.nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor | None]:
    """The tensors, or what a reload makes them from."""
    prepared = layerwise.get_layerwise_info(layer).restore_metadata[0]
    return {
        name: layer._parameters.get(name) if name in SKIP_TENSORS else prepared.get(name) for name in names
    }


def _open(layer: torch.nn.Module) -> None:
    """What initialize_layerwise_reload does with each layer."""
    info = layerwise.get_layerwise_info(layer)
    if info.can_load():
        return
    info.kernel_tensors = get_layer_params_buffers(layer)
    info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
    restore_layer_on_meta(layer, info)
    layerwise.initialize_online_processing(layer)
