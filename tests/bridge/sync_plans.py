"""Plans for tests of a sync: tensors, and who owns which part of them."""

import torch

from bridge.layouts import region_of
from bridge.plan import Piece, Plan, TensorInfo


def info(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorInfo:
    """A tensor, by default of float32."""
    return TensorInfo(name=name, dtype=dtype, shape=shape)


def piece(name: str, rank: int, *region: tuple[int, int]) -> Piece:
    """A region that is a parameter of its own."""
    local = tuple((0, stop - start) for start, stop in region)
    return Piece(tensor=name, region=region, rank=rank, parameter=name, local_region=local)


def whole(*tensors: TensorInfo) -> Plan:
    """Rank 0 owns all of every tensor."""
    pieces = {one.name: (piece(one.name, 0, *region_of(one.shape)),) for one in tensors}
    return Plan(tensors=tensors, pieces=pieces)
