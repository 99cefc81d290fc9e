"""Cuts against Megatron's layouts written as tensor expressions: reshape, cat, chunk."""

import pytest
import torch

from bridge.layouts import QKV, GateUp, Layout, Replicated, Row, Shard, Vocabulary, padded_vocabulary, slices

GROUPS, PER_GROUP, HEAD, HIDDEN = 4, 3, 2, 5


def tensor(*shape: int, offset: int = 0) -> torch.Tensor:
    return torch.arange(offset, offset + torch.Size(shape).numel()).reshape(shape)


def cut(
    layout: Layout, sources: list[torch.Tensor], like: torch.Tensor, rank: int, size: int
) -> torch.Tensor:
    """A parameter filled through the cuts; -1 where no cut wrote, an error where two did."""
    shard = Shard(rank=rank, size=size, num_query_groups=GROUPS, head_dim=HEAD)
    local = torch.full_like(like, -1)
    for each in layout.cuts([tuple(source.shape) for source in sources], shard):
        target = local[slices(each.local_region)]
        assert (target == -1).all()
        target.copy_(sources[each.source][slices(each.hf_region)])
    return local


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tail", [(HIDDEN,), ()])
def test_qkv_interleaves_by_query_group(size: int, tail: tuple[int, ...]) -> None:
    q = tensor(GROUPS * PER_GROUP * HEAD, *tail)
    k = tensor(GROUPS * HEAD, *tail, offset=1000)
    v = tensor(GROUPS * HEAD, *tail, offset=2000)
    grouped = [
        q.view(GROUPS, PER_GROUP * HEAD, *tail),
        k.view(GROUPS, HEAD, *tail),
        v.view(GROUPS, HEAD, *tail),
    ]
    full = torch.cat(grouped, dim=1).reshape(-1, *tail)
    for rank, expected in enumerate(full.chunk(size)):
        assert torch.equal(cut(QKV(), [q, k, v], expected, rank, size), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gate_up_stacks_the_ranks_own_rows(size: int) -> None:
    gate, up = tensor(6, HIDDEN), tensor(6, HIDDEN, offset=1000)
    for rank in range(size):
        expected = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
        assert torch.equal(cut(GateUp(), [gate, up], expected, rank, size), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_row_splits_columns(size: int) -> None:
    full = tensor(4, 6)
    for rank, expected in enumerate(full.chunk(size, dim=1)):
        assert torch.equal(cut(Row(), [full], expected, rank, size), expected)


def test_replicated_is_the_whole_on_every_rank() -> None:
    full = tensor(7)
    assert torch.equal(cut(Replicated(), [full], full, 1, 2), full)


@pytest.mark.parametrize(("vocabulary", "size"), [(10, 1), (10, 2), (11, 2), (5, 4), (9, 4)])
def test_vocabulary_is_padded_at_the_end(vocabulary: int, size: int) -> None:
    full = tensor(vocabulary, HIDDEN)
    padding = torch.full((padded_vocabulary(vocabulary, size) - vocabulary, HIDDEN), -1)
    for rank, expected in enumerate(torch.cat([full, padding]).chunk(size)):
        assert torch.equal(cut(Vocabulary(), [full], expected, rank, size), expected)
