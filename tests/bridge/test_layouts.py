"""Cuts against Megatron's layouts written as tensor expressions, and as tilings of random sizes."""

import random
from collections.abc import Callable

import pytest
import torch

from bridge.layouts import (
    QKV,
    Column,
    Cut,
    GateUp,
    Layout,
    Packed,
    PackedInterleavedGateUp,
    Replicated,
    Row,
    Shape,
    Shard,
    Vocabulary,
    padded_vocabulary,
    slices,
)

GROUPS, PER_GROUP, HEAD, HIDDEN = 4, 3, 2, 5
ROWS = GROUPS * (PER_GROUP + 2) * HEAD


def tensor(*shape: int, offset: int = 0) -> torch.Tensor:
    return torch.arange(offset, offset + torch.Size(shape).numel()).reshape(shape)


def shard_of(rank: int, size: int, *, vocabulary: int = 0, experts: int = 0, expert: int = 0) -> Shard:
    return Shard(
        rank=rank,
        size=size,
        num_query_groups=GROUPS,
        head_dim=HEAD,
        vocab_size=vocabulary,
        num_experts=experts,
        expert=expert if experts else None,
    )


def put(local: torch.Tensor, each: Cut, source: torch.Tensor) -> None:
    """Copy what a cut names into the parameter; an error where another has written."""
    box, part = local[slices(each.local_region)], source[slices(each.hf_region)]
    assert (box == -1).all()
    if each.fold is None:
        box.copy_(part.reshape(box.shape))
        return
    permuted = [each.fold.split[dim] for dim in each.fold.order]
    back = [each.fold.order.index(dim) for dim in range(len(permuted))]
    box.copy_(part.reshape(permuted).permute(back).reshape(box.shape))


def cut(layout: Layout, sources: list[torch.Tensor], like: torch.Tensor, shard: Shard) -> torch.Tensor:
    """A parameter filled through the cuts; -1 where no cut wrote."""
    local = torch.full_like(like, -1)
    for each in layout.cuts([tuple(source.shape) for source in sources], shard):
        put(local, each, sources[each.source])
    return local


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 20])
@pytest.mark.parametrize("tail", [(HIDDEN,), ()])
def test_qkv_interleaves_by_query_group(size: int, tail: tuple[int, ...], fused: bool) -> None:
    """Up to a rank for every head, and for every two rows."""
    q = tensor(GROUPS * PER_GROUP * HEAD, *tail)
    k = tensor(GROUPS * HEAD, *tail, offset=1000)
    v = tensor(GROUPS * HEAD, *tail, offset=2000)
    grouped = [
        q.view(GROUPS, PER_GROUP * HEAD, *tail),
        k.view(GROUPS, HEAD, *tail),
        v.view(GROUPS, HEAD, *tail),
    ]
    full = torch.cat(grouped, dim=1).reshape(-1, *tail)
    sources = [torch.cat([q, k, v])] if fused else [q, k, v]
    for rank, expected in enumerate(full.chunk(size)):
        assert torch.equal(cut(QKV(fused), sources, expected, shard_of(rank, size)), expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gate_up_stacks_the_ranks_own_rows(size: int, fused: bool) -> None:
    gate, up = tensor(6, HIDDEN), tensor(6, HIDDEN, offset=1000)
    sources = [torch.cat([gate, up])] if fused else [gate, up]
    for rank in range(size):
        expected = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
        assert torch.equal(cut(GateUp(fused), sources, expected, shard_of(rank, size)), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_row_splits_columns(size: int) -> None:
    full = tensor(4, 6)
    for rank, expected in enumerate(full.chunk(size, dim=1)):
        assert torch.equal(cut(Row(), [full], expected, shard_of(rank, size)), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("tail", [(HIDDEN,), ()])
def test_column_splits_rows(size: int, tail: tuple[int, ...]) -> None:
    full = tensor(6, *tail)
    for rank, expected in enumerate(full.chunk(size)):
        assert torch.equal(cut(Column(), [full], expected, shard_of(rank, size)), expected)


def test_replicated_is_the_whole_on_every_rank() -> None:
    full = tensor(7)
    assert torch.equal(cut(Replicated(), [full], full, shard_of(1, 2)), full)


@pytest.mark.parametrize(("vocabulary", "size"), [(10, 1), (10, 2), (11, 2), (5, 4), (9, 4)])
def test_vocabulary_is_padded_at_the_end(vocabulary: int, size: int) -> None:
    full = tensor(vocabulary, HIDDEN)
    padding = torch.full((padded_vocabulary(vocabulary, size) - vocabulary, HIDDEN), -1)
    for rank, expected in enumerate(torch.cat([full, padding]).chunk(size)):
        assert torch.equal(cut(Vocabulary(), [full], expected, shard_of(rank, size)), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_experts_are_slabs_of_one_tensor(size: int, transposed: bool) -> None:
    gate_up, down = tensor(3, 12, HIDDEN), tensor(3, HIDDEN, 6)
    for expert in range(3):
        for rank in range(size):
            shard = shard_of(rank, size, experts=3, expert=expert)
            gate, up = (half.chunk(size)[rank] for half in gate_up[expert].chunk(2))
            for layout, source, expected in (
                (GateUp(fused=True), gate_up, torch.cat([gate, up])),
                (Row(), down, down[expert].chunk(size, dim=1)[rank]),
            ):
                held = source.transpose(1, 2).contiguous() if transposed else source
                assert torch.equal(cut(Packed(layout, transposed), [held], expected, shard), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("between", [(HIDDEN,), ()])
def test_alternating_gate_and_up_are_put_apart(size: int, between: tuple[int, ...]) -> None:
    packed = tensor(3, *between, 12)
    for expert in range(3):
        for rank in range(size):
            gate, up = (packed[expert].movedim(-1, 0)[half::2].chunk(size)[rank] for half in (0, 1))
            expected = torch.cat([gate, up])
            shard = shard_of(rank, size, experts=3, expert=expert)
            assert torch.equal(cut(PackedInterleavedGateUp(), [packed], expected, shard), expected)


def draw_qkv_rows(rng: random.Random, size: int) -> int | None:
    return ROWS // size if ROWS % size == 0 else None


def draw_even(rng: random.Random, size: int) -> int:
    return 2 * rng.randint(1, 4)


LAYOUTS: list[tuple[Layout, Callable[[random.Random, int], int | None]]] = [
    (Replicated(), draw_even),
    (Column(), draw_even),
    (Row(), draw_even),
    (GateUp(), draw_even),
    (GateUp(fused=True), draw_even),
    (QKV(), draw_qkv_rows),
    (QKV(fused=True), draw_qkv_rows),
    (Packed(GateUp(fused=True)), draw_even),
    (Packed(Row()), draw_even),
    (Packed(Replicated()), draw_even),
    (Packed(Row(), transposed=True), draw_even),
    (Packed(GateUp(fused=True), transposed=True), draw_even),
    (PackedInterleavedGateUp(), draw_even),
]


def visits(layout: Layout, local: Shape, size: int, experts: int) -> tuple[list[torch.Tensor], list[Shape]]:
    """How often the cuts of all ranks and experts visit each element of the HF tensors, and their shapes.

    Every rank's own parameter must be visited exactly once.
    """
    first = layout.shapes(local, shard_of(0, size, experts=experts))
    counts = [torch.zeros(shape, dtype=torch.int) for shape in first]
    for expert in range(max(experts, 1)):
        for rank in range(size):
            shard = shard_of(rank, size, experts=experts, expert=expert)
            shapes = layout.shapes(local, shard)
            assert shapes == first
            held = torch.zeros(local, dtype=torch.int)
            for each in layout.cuts(shapes, shard):
                held[slices(each.local_region)] += 1
                counts[each.source][slices(each.hf_region)] += 1
            assert (held == 1).all()
    return counts, list(first)


@pytest.mark.parametrize(
    ("layout", "draw_rows"), LAYOUTS, ids=[repr(layout).replace(" ", "") for layout, _ in LAYOUTS]
)
def test_cuts_of_all_ranks_tile_the_shapes_that_a_parameter_implies(
    layout: Layout, draw_rows: Callable[[random.Random, int], int | None]
) -> None:
    rng = random.Random(5)
    packed = isinstance(layout, Packed | PackedInterleavedGateUp)
    for _ in range(40):
        size = rng.randint(1, 6)
        rows = draw_rows(rng, size)
        if rows is None:
            continue
        counts, shapes = visits(layout, (rows, rng.randint(1, 5)), size, rng.randint(1, 4) if packed else 0)
        # A tensor that every rank holds is visited by every rank.
        wanted = size if layout.parallel_dim is None else 1
        for count, shape in zip(counts, shapes, strict=True):
            assert count.shape == shape
            assert (count == wanted).all()


def test_cuts_of_all_ranks_tile_the_vocabulary_whatever_its_padding() -> None:
    rng = random.Random(6)
    for _ in range(100):
        vocabulary, size = rng.randint(1, 30), rng.randint(1, 6)
        padded = padded_vocabulary(vocabulary, size) + size * rng.randint(0, 3)
        count = torch.zeros(vocabulary, 3, dtype=torch.int)
        for rank in range(size):
            shard = Shard(
                rank=rank,
                size=size,
                num_query_groups=1,
                head_dim=1,
                vocab_size=vocabulary,
                padded_vocab_size=padded,
            )
            (shape,) = Vocabulary().shapes((padded // size, 3), shard)
            assert shape == (vocabulary, 3)
            for each in Vocabulary().cuts([shape], shard):
                count[slices(each.hf_region)] += 1
        assert (count == 1).all()
