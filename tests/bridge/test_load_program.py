"""Weights loaded by recorded copies, against vLLM's own reload of the same weights, bit by bit."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from tests.bridge.vllm_modules import import_quietly

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def program() -> Any:
    return import_quietly("bridge.transport.load_program")


Loader = Callable[..., None]


def whole(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    param.data.copy_(loaded_weight)


def half(param: torch.Tensor, loaded_weight: torch.Tensor, which: int) -> None:
    rows = param.shape[0] // 2
    param.data.narrow(0, which * rows, rows).copy_(loaded_weight)


def expert(param: torch.Tensor, loaded_weight: torch.Tensor, which: int) -> None:
    """Transposed, and only the second half of the columns, as tensor parallelism takes them."""
    param.data[which].copy_(loaded_weight.t()[:, 2:])


def padded(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    param[: loaded_weight.shape[0]].data.copy_(loaded_weight)
    param[loaded_weight.shape[0] :].data.fill_(0)


def computed(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    param.data.copy_(loaded_weight * 2)


def twice(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """The second copy is of what is in the parameter."""
    param.data.copy_(loaded_weight)
    param.data.copy_(param.data + 1)


def added(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    param.data.copy_(loaded_weight)
    param.data.add_(1)


def branching(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    if float(loaded_weight.sum()) > 0:
        param.data.copy_(loaded_weight)
    else:
        param.data.copy_(loaded_weight.flip(0))


def layer(load: Loader, *shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    module = torch.nn.Module()
    parameter = torch.nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)
    vars(parameter)["weight_loader"] = load
    module.register_parameter("weight", parameter)
    return module


class Toy(torch.nn.Module):
    """A model as vLLM's are: loaders on parameters, and load_weights that chooses among them."""

    def __init__(self, **layers: torch.nn.Module) -> None:
        super().__init__()
        for name, module in layers.items():
            self.add_module(name, module)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """A tensor `name` is of layer `name`, a tensor `name.i` is its part i."""
        for name, tensor in weights:
            owner, _, part = name.partition(".")
            parameter: Any = getattr(self, owner).weight
            parameter.weight_loader(parameter, tensor, *([int(part)] if part else []))


TENSORS = {"plain": (4, 3), "fused.0": (2, 3), "fused.1": (2, 3), "padded": (5, 3), "cast": (6,)}
TENSORS |= {f"experts.{i}": (4, 3) for i in range(3)}
ODD = {"computed": computed, "twice": twice, "added": added, "branching": branching}


def toy(program: Any) -> tuple[Toy, dict[str, tuple[int, ...]]]:
    """All kinds of layers; those of ODD cannot be made of copies."""

    class Sorted(program.QuantizeMethodBase):
        """Processing as of experts on CPU: the kernel has another form than the checkpoint."""

        def create_weights(self, *args: Any, **kwargs: Any) -> None:
            """Not asked for."""

        def apply(self, *args: Any, **kwargs: Any) -> Any:
            """Not asked for."""

        def process_weights_after_loading(self, layer: Any) -> None:
            layer.weight = torch.nn.Parameter(layer.weight.transpose(1, 2).contiguous() * 3, False)

    experts = layer(expert, 3, 3, 2)
    vars(experts)["quant_method"] = Sorted()
    layers = {
        "plain": layer(whole, 4, 3),
        "fused": layer(half, 4, 3),
        "padded": layer(padded, 8, 3),
        "cast": layer(whole, 6, dtype=torch.bfloat16),
        "experts": experts,
        **{name: layer(load, 4, 3) for name, load in ODD.items()},
    }
    model = Toy(**layers)
    program.layerwise.record_metadata_for_reloading(model)
    vars(experts)["quant_method"].process_weights_after_loading(experts)
    return model, {**TENSORS, **dict.fromkeys(ODD, (4, 3))}


def made(shapes: dict[str, tuple[int, ...]], seed: int) -> list[tuple[str, torch.Tensor]]:
    """Weights; one element is not a number, and the sums have the sign of an even seed."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    found["plain"][0, 0] = torch.nan
    return [(name, tensor * (1 if seed % 2 == 0 else -1)) for name, tensor in found.items()]


def by_loaders(program: Any, model: Toy, weights: Any, watched: bool = False) -> Any:
    """An update as vLLM makes it; the program that was recorded meanwhile."""
    program.layerwise.initialize_layerwise_reload(model)
    recorder = program.LoadRecorder(model=model)
    for start in range(0, len(weights), 2):
        some = weights[start : start + 2]
        if watched:
            with recorder.watching(some):
                model.load_weights(iter(some))
        else:
            model.load_weights(iter(some))
    with recorder.watching() if watched else torch.no_grad():
        program.layerwise.finalize_layerwise_reload(model, None)
    return recorder.program() if watched else None


def by_program(program: Any, model: Toy, found: Any, weights: Any) -> list[str]:
    """An update by the program; the names that it left to the loaders."""
    found.open()
    left = [pair for weight in weights for pair in found.load([weight])]
    model.load_weights(iter(left))
    program.layerwise.finalize_layerwise_reload(model, None)
    return [name for name, _ in left]


def bits(model: Toy) -> dict[str, list[int]]:
    return {
        name: parameter.detach().contiguous().view(-1).view(torch.uint8).tolist()
        for name, parameter in model.named_parameters()
    }


def test_copies_give_the_very_bits_that_loaders_give(program: Any) -> None:
    model, shapes = toy(program)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    found = by_loaders(program, model, made(shapes, 0), watched=True)
    assert sorted(found.live_layers) == ["cast", "fused", "padded", "plain"]
    assert found.remade_layers == ["experts"]
    reference, _ = toy(program)
    by_loaders(program, reference, made(shapes, 0))
    assert bits(model) == bits(reference)
    for seed in (1, 2, 3):
        assert found.fits()
        left = by_program(program, model, found, made(shapes, seed))
        assert left == list(ODD)
        assert found.incomplete(None) == []
        by_loaders(program, reference, made(shapes, seed))
        assert bits(model) == bits(reference)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places


def test_a_program_knows_what_did_not_come(program: Any) -> None:
    model, shapes = toy(program)
    found = by_loaders(program, model, made(shapes, 0), watched=True)
    found.open()
    found.load([pair for pair in made(shapes, 1) if pair[0] not in ("fused.1", "experts.2")])
    assert found.incomplete(None) == ["fused (6 of 12)", "experts (12 of 18)"]
    # By units: all came of those whose names have no dot.
    assert found.incomplete([""]) == ["fused (6 of 0)", "experts (12 of 0)"]


def test_a_program_fits_no_model_that_has_changed(program: Any) -> None:
    def moved(model: Any) -> None:
        model.plain.weight.data = model.plain.weight.data.clone()

    def other_type(model: Any) -> None:
        model.cast.weight.data = model.cast.weight.data.to(torch.float16)

    def other_layer(model: Any) -> None:
        model.fused = layer(half, 4, 3)

    def processed_now(model: Any) -> None:
        model.plain.quant_method = model.experts.quant_method

    for change in (moved, other_type, other_layer, processed_now):
        model, shapes = toy(program)
        found = by_loaders(program, model, made(shapes, 0), watched=True)
        assert found.fits()
        change(model)
        assert not found.fits()


def test_a_tensor_that_a_layer_without_a_program_needs_too_is_left_to_loaders(program: Any) -> None:
    class Shared(Toy):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for _, tensor in weights:
                for owner in ("plain", "both"):
                    parameter: Any = getattr(self, owner).weight
                    parameter.weight_loader(parameter, tensor)

    def spoiling(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
        param.data.copy_(loaded_weight)
        param.data.mul_(2)

    model = Shared(plain=layer(whole, 4, 3), both=layer(spoiling, 4, 3))
    program.layerwise.record_metadata_for_reloading(model)
    assert by_loaders(program, model, made({"plain": (4, 3)}, 0), watched=True) is None


def test_a_model_that_looks_at_values_has_no_program(program: Any) -> None:
    class Choosing(Toy):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            super().load_weights((name, w if float(w.max()) > 0 else w.flip(0)) for name, w in weights)

    model = Choosing(plain=layer(whole, 4, 3))
    program.layerwise.record_metadata_for_reloading(model)
    assert by_loaders(program, model, [("plain", torch.rand(4, 3))], watched=True) is None
