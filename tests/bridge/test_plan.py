import pytest
import torch

from bridge.layouts import Region
from bridge.plan import Piece, TensorInfo, build_plan
from bridge.rules import RuleError


def info(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=shape)


def piece(tensor: str, rank: int, *region: tuple[int, int], copy: bool = False) -> Piece:
    return Piece(tensor=tensor, region=region, rank=rank, parameter="p", local_region=region, copy=copy)


def test_replicas_share_the_work() -> None:
    tensors = [info(f"t{number}", 4) for number in range(4)]
    claims = [piece(tensor.name, rank, (0, 4)) for rank in (0, 1) for tensor in tensors]
    plan = build_plan(tensors, claims)
    owners = [plan.pieces[tensor.name][0].rank for tensor in tensors]
    assert sorted(owners) == [0, 0, 1, 1]


def test_a_tied_copy_is_never_the_owner() -> None:
    tensors = [info("embed", 4)]
    plan = build_plan(tensors, [piece("embed", 1, (0, 4), copy=True), piece("embed", 3, (0, 4))])
    assert plan.pieces["embed"][0].rank == 3


@pytest.mark.parametrize(
    "regions",
    [
        [((0, 2), (0, 3))],
        [((0, 2), (0, 3)), ((3, 4), (0, 3))],
        [((0, 3), (0, 3)), ((2, 4), (0, 3))],
        [((0, 2), (0, 3)), ((2, 4), (0, 2))],
        [((0, 4), (0, 3)), ((0, 2), (0, 3))],
        [],
    ],
    ids=["half", "hole", "overlap", "corner", "whole and half", "nothing"],
)
def test_a_tensor_that_is_not_covered_once_is_named(regions: list[Region]) -> None:
    claims = [piece("good", 0, (0, 1)), *(piece("bad", 0, *region) for region in regions)]
    with pytest.raises(RuleError, match=r"tensors: bad$"):
        build_plan([info("good", 1), info("bad", 4, 3)], claims)


@pytest.mark.parametrize(
    "regions",
    [[((0, 4), (0, 3))], [((0, 1), (0, 3)), ((1, 4), (0, 3))], [((0, 4), (2, 3)), ((0, 4), (0, 2))]],
)
def test_rows_or_columns_in_any_order_cover(regions: list[Region]) -> None:
    plan = build_plan([info("good", 4, 3)], [piece("good", rank, *r) for rank, r in enumerate(regions)])
    assert len(plan.pieces["good"]) == len(regions)


def test_buckets_keep_order_respect_the_limit_and_align() -> None:
    tensors = [info("a", 3, dtype=torch.bfloat16), info("b", 2), info("big", 100), info("c", 1)]
    plan = build_plan(tensors, [piece(t.name, 0, *((0, side) for side in t.shape)) for t in tensors])
    buckets = plan.buckets(64)
    assert [[tensor.name for tensor in bucket.tensors] for bucket in buckets] == [["a", "b"], ["big"], ["c"]]
    assert buckets[0].offsets == (0, 8)
    assert buckets[0].nbytes == 16
    assert buckets[1].nbytes == 400


def test_owned_pieces_of_a_bucket_are_the_ranks_in_tensor_order() -> None:
    tensors = [info("a", 4), info("b", 4)]
    claims = [piece(name, rank, (2 * rank, 2 * rank + 2)) for rank in (0, 1) for name in ("b", "a")]
    plan = build_plan(tensors, claims)
    (bucket,) = plan.buckets(1 << 20)
    assert plan.owners(bucket) == (0, 1)
    assert [(p.tensor, p.region) for p in plan.owned(bucket, 1)] == [("a", ((2, 4),)), ("b", ((2, 4),))]
