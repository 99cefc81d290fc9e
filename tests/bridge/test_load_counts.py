"""vLLM's count of what a loader copies, remembered: it has to be the very count that vLLM makes."""

import inspect
from typing import Any

import pytest
import torch

from tests.bridge.vllm_modules import import_quietly

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def fixes() -> Any:
    return import_quietly("bridge.transport.vllm_fixes")


class Rows:
    """A layer whose loader copies a part of what it is given."""

    def __init__(self) -> None:
        self.calls = 0

    def load(self, param: torch.Tensor, loaded_weight: torch.Tensor, shard: Any = None) -> bool:
        self.calls += 1
        rows = loaded_weight.shape[0] // (1 if shard is None else 2)
        param[:rows].copy_(loaded_weight[:rows])
        return shard != "other"


def bound(layer: Rows, rows: int, shard: Any) -> inspect.BoundArguments:
    weight = torch.zeros(rows, 3)
    arguments = inspect.signature(layer.load).bind(torch.empty(8, 3, device="meta"), weight, shard)
    arguments.apply_defaults()
    return arguments


def test_every_kind_of_call_is_counted_once_and_as_vllm_counts(fixes: Any) -> None:
    layerwise = fixes.layerwise
    one, two = Rows(), Rows()
    kinds = [(one, 4, None), (one, 4, "half"), (one, 4, "other"), (one, 6, None), (two, 6, None)]
    own = layerwise.get_numel_loaded
    expected = [own(layer.load, bound(layer, rows, shard)) for layer, rows, shard in kinds]
    assert expected == [(12, True), (6, True), (6, False), (18, True), (18, True)]
    counts = fixes.LoadCounts()
    for _ in range(3):
        with counts.in_use():
            found = [
                layerwise.get_numel_loaded(layer.load, bound(layer, rows, shard))
                for layer, rows, shard in kinds
            ]
        assert found == expected
        assert layerwise.get_numel_loaded is own
    assert (one.calls, two.calls) == (4 + 4, 1 + 1)


def test_what_cannot_be_compared_and_what_fails_is_not_remembered(fixes: Any) -> None:
    layerwise = fixes.layerwise
    layer, counts = Rows(), fixes.LoadCounts()
    with counts.in_use():
        for _ in range(2):
            assert layerwise.get_numel_loaded(layer.load, bound(layer, 4, ["a list"])) == (6, True)
            with pytest.raises(AssertionError):
                layerwise.get_numel_loaded(layer.load, bound(layer, 10, None))
    assert layer.calls == 4
