import itertools
import random

import pytest
import torch

from bridge.layouts import Fold, Region, region_of, slices
from bridge.plan import Piece, TensorInfo, build_plan, covers
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


def test_buckets_keep_order_and_respect_the_limit() -> None:
    tensors = [info("a", 3, dtype=torch.bfloat16), info("b", 2), info("big", 100), info("c", 1)]
    plan = build_plan(tensors, [piece(t.name, 0, *((0, side) for side in t.shape)) for t in tensors])
    buckets = plan.buckets(64)
    assert [[tensor.name for tensor in bucket.tensors] for bucket in buckets] == [["a", "b"], ["big"], ["c"]]
    assert [bucket.nbytes for bucket in buckets] == [14, 400, 4]


def grid(chance: random.Random, whole: Region, dims: tuple[int, ...]) -> list[Region]:
    """The region cut along one dimension after the other, each part in its own places."""
    if not dims:
        return [whole]
    dim, *rest = dims
    start, stop = whole[dim]
    inner = range(start + 1, stop)
    edges = [start, *sorted(chance.sample(inner, chance.randint(0, len(inner)))), stop]
    return [
        region
        for side in itertools.pairwise(edges)
        for region in grid(chance, (*whole[:dim], side, *whole[dim + 1 :]), tuple(rest))
    ]


@pytest.mark.parametrize("seed", range(30))
def test_grids_in_any_order_of_dimensions_cover_and_nothing_less_or_more(seed: int) -> None:
    chance = random.Random(seed)
    shape = tuple(chance.randint(1, 4) for _ in range(chance.randint(1, 3)))
    dims = tuple(chance.sample(range(len(shape)), len(shape)))
    regions = grid(chance, region_of(shape), dims)
    chance.shuffle(regions)
    painted = torch.zeros(shape)
    for region in regions:
        painted[slices(region)] += 1
    assert torch.all(painted == 1)
    assert covers(region_of(shape), regions)
    one = chance.choice(regions)
    without = [region for region in regions if region != one]
    assert not covers(region_of(shape), without)
    assert not covers(region_of(shape), [*regions, one])
    # Another region in the place of one is a hole and an overlap.
    other = chance.choice(without) if without else None
    if other is not None:
        assert not covers(region_of(shape), [*without, other])
    wider = region_of((shape[0] + 1, *shape[1:]))
    assert not covers(wider, regions)


def test_scalars_are_covered_by_one_owner() -> None:
    assert covers((), [()])
    assert not covers((), [])
    assert not covers((), [(), ()])


def test_a_pinwheel_is_no_layout() -> None:
    """It covers, but no order of the dimensions cuts it; no parallel layout makes one."""
    arms: list[Region] = [
        ((0, 1), (0, 2)),
        ((0, 2), (2, 3)),
        ((2, 3), (1, 3)),
        ((1, 3), (0, 1)),
        ((1, 2), (1, 2)),
    ]
    assert not covers(((0, 3), (0, 3)), arms)


@pytest.mark.parametrize("offset", [0, 3])
def test_a_folded_piece_reads_and_writes_the_box_element_by_element(offset: int) -> None:
    """gpt_oss's gate and up: column 2 i + k of the HF tensor is row k rows / 2 + i of the box."""
    rows, width = 6, 5
    parameter = torch.arange(float((rows + offset) * width)).view(rows + offset, width)
    folded = Piece(
        tensor="t",
        region=((2, 3), (0, width), (4, 4 + rows)),
        rank=0,
        parameter="p",
        local_region=((offset, offset + rows), (0, width)),
        fold=Fold((2, rows // 2, width), (2, 1, 0)),
    )
    value = folded.get(parameter)
    assert value.shape == (1, width, rows)
    for column, pair, half in itertools.product(range(width), range(rows // 2), range(2)):
        assert value[0, column, 2 * pair + half] == parameter[offset + half * rows // 2 + pair, column]
    copy = torch.full_like(parameter, -1)
    folded.put(copy, value)
    assert torch.equal(copy[offset:], parameter[offset:])
    assert torch.all(copy[:offset] == -1)


def test_replicas_share_by_bytes_and_copies_follow_their_original() -> None:
    tensors = [info("big", 100), info("a", 40), info("b", 60), info("again", 100)]
    claims = [piece(tensor.name, rank, (0, tensor.shape[0])) for rank in (0, 1) for tensor in tensors[:3]]
    plan = build_plan(tensors, claims, {"again": "big"})
    owners = {name: plan.pieces[name][0].rank for name in plan.pieces}
    assert owners["big"] != owners["a"] == owners["b"]
    assert plan.pieces["again"][0].tensor == "again"
    assert plan.pieces["again"][0].region == ((0, 100),)
