"""A model's parameters as they are with its adapters merged in; neither is changed."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch

from bridge.lora import Part, Target


class MergedParameters(Mapping[str, torch.Tensor]):
    """Base parameters by global name, each computed anew when it is asked for: W + scale * B A.

    The sum is taken in float32 and rounded once to the type of W. It needs what this rank has and no messages:
    rows of B and columns of A are cut as W is. What has no adapter is given as it is.
    """

    def __init__(
        self,
        base: Mapping[str, torch.Tensor],
        adapters: Mapping[str, torch.Tensor],
        targets: Sequence[Target],
    ) -> None:
        """`adapters` are the parameters that `Target.parameter` names."""
        self._base = base
        self._adapters = adapters
        self._targets = {target.weight: target for target in targets}

    @property
    def targets(self) -> Collection[str]:
        """Names of those that have an adapter."""
        return self._targets.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        weight, target = self._base[name], self._targets.get(name)
        if target is None:
            return weight
        merged = weight.detach().to(torch.float32, copy=True)
        for part in target.parts:
            self._add(merged, target, part)
        return merged.to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)

    def _add(self, merged: torch.Tensor, target: Target, part: Part) -> None:
        factor_A, factor_B = self._factor(target, part, "A"), self._factor(target, part, "B")
        delta = part.scale * (factor_B @ factor_A)
        if target.is_embedding:
            merged += delta.T
            return
        position = 0
        for rows in part.rows:
            merged[rows.local : rows.local + rows.count] += delta[position : position + rows.count]
            position += rows.count

    def _factor(self, target: Target, part: Part, factor: Literal["A", "B"]) -> torch.Tensor:
        return self._adapters[target.parameter(part, factor)].detach().float()


def fixed_parameters(parameters: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Global names of those that no optimizer step changes, neither by themselves nor by an adapter."""
    adapted: Collection[str] = parameters.targets if isinstance(parameters, MergedParameters) else ()
    # Asked one by one, merged ones would be computed.
    own = (name for name in parameters if name not in adapted)
    return frozenset(name for name in own if not parameters[name].requires_grad)


class LastKept(Mapping[str, torch.Tensor]):
    """A mapping that keeps the last item, for one walk in which many pieces of a parameter follow each other.

    Not for longer: parameters change.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            self._last = name, self._parameters[name]
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
