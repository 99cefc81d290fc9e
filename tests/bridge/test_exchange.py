"""What moves between pieces and file blocks, without processes: sums, coverage and values by hand."""

from collections.abc import Iterable

import pytest
import torch

from bridge.exchange import (
    as_bytes,
    file_blocks,
    from_bytes,
    is_split_by_columns,
    load_pieces,
    save_pieces,
    transfers,
)
from bridge.layouts import Fold, Region, is_contiguous, region_numel, region_of, region_shape, slices
from bridge.plan import Piece, TensorInfo, build_plan


def info(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=shape)


def piece(tensor: str, rank: int, region: Region, parameter: str = "p") -> Piece:
    local = tuple((0, stop - start) for start, stop in region)
    return Piece(tensor=tensor, region=region, rank=rank, parameter=parameter, local_region=local)


def columns(name: str, shape: tuple[int, ...], ranks: int) -> list[Piece]:
    """Equal column ranges, as of a row-parallel matrix, or of one for each expert."""
    width = shape[-1] // ranks
    leads = [((expert, expert + 1),) for expert in range(shape[0])] if len(shape) == 3 else [()]
    return [
        piece(
            name,
            rank,
            (*lead, (0, shape[-2]), (rank * width, (rank + 1) * width)),
            f"p{lead[0][0] if lead else 0}",
        )
        for lead in leads
        for rank in range(ranks)
    ]


def painted(shape: tuple[int, ...], regions: Iterable[Region]) -> torch.Tensor:
    """How many of the regions have each element."""
    count = torch.zeros(shape, dtype=torch.int64)
    for region in regions:
        count[slices(region)] += 1
    return count


SHAPES = [(5, 6), (2, 6), (1, 6), (7, 12), (3, 4, 6)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_ranges_of_the_file_that_cover_it_once(shape: tuple[int, ...], ranks: int) -> None:
    tensor = info("t", *shape)
    blocks = file_blocks(tensor, columns("t", shape, ranks))
    assert torch.all(painted(shape, (block.region for block in blocks)) == 1)
    assert all(is_contiguous(block.region, shape) for block in blocks)
    for block in blocks:
        # No rank has more than its share, to the row.
        assert block.region[-2][1] - block.region[-2][0] <= -(-shape[-2] // ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transfers_bring_every_element_of_every_piece_once(shape: tuple[int, ...], ranks: int) -> None:
    tensor = info("t", *shape, dtype=torch.bfloat16)
    pieces = columns("t", shape, ranks)
    moves = transfers(tensor, pieces)
    assert torch.all(painted(shape, (move.shared for move in moves)) == 1)
    assert sum(move.nbytes for move in moves) == tensor.nbytes
    for move in moves:
        for whole in (move.piece.region, move.block.region):
            assert all(a <= c and d <= b for (a, b), (c, d) in zip(whole, move.shared, strict=True))
    for one in pieces:
        mine = sum(region_numel(move.shared) for move in moves if move.piece == one)
        assert mine == region_numel(one.region)


def test_only_pieces_that_are_no_range_are_exchanged() -> None:
    tensor = info("t", 4, 6)
    assert is_split_by_columns(tensor, columns("t", (4, 6), 2))
    assert not is_split_by_columns(tensor, columns("t", (4, 6), 1))
    rows = [piece("t", rank, ((2 * rank, 2 * rank + 2), (0, 6))) for rank in (0, 1)]
    assert not is_split_by_columns(tensor, rows)
    # The columns of a matrix with one row are ranges.
    assert not is_split_by_columns(info("t", 1, 6), columns("t", (1, 6), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", range(9))
def test_values_are_read_at_any_offset_of_a_message(dtype: torch.dtype, offset: int) -> None:
    value = torch.arange(6, dtype=dtype).view(2, 3)
    message = torch.cat([torch.zeros(offset, dtype=torch.uint8), as_bytes(value)])
    assert torch.equal(from_bytes(message[offset:], dtype, ((1, 3), (4, 7))), value)


def test_bytes_are_in_row_major_order_of_what_is_seen() -> None:
    turned = torch.arange(6, dtype=torch.int16).view(2, 3).T
    assert as_bytes(turned).tolist() == [0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0]


class Store:
    """A checkpoint in memory, and what was asked of it."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._values = tensors
        self.tensors = {name: info(name, *value.shape, dtype=value.dtype) for name, value in tensors.items()}
        self.log: list[str] = []
        self.committed: list[str] = []

    def position(self, name: str) -> tuple[str, int]:
        return "file", -list(self._values).index(name)

    def read(self, name: str, region: Region) -> torch.Tensor:
        self.log.append(name)
        return self._values[name][slices(region)].clone()

    def read_into(self, name: str, region: Region, out: torch.Tensor) -> None:
        assert out.shape == region_shape(region)
        self.log.append(name)
        out.copy_(self._values[name][slices(region)])

    def write(self, name: str, region: Region, value: torch.Tensor) -> None:
        assert value.shape == region_shape(region)
        assert name not in self.committed
        self.log.append(name)
        self._values[name][slices(region)] = value.to(self._values[name].dtype)

    def commit(self, names: Iterable[str]) -> None:
        self.committed += names


def folded() -> tuple[list[Piece], dict[str, torch.Tensor]]:
    """A plain matrix, and an expert's transposed and interleaved ones, with their parameters."""
    whole = region_of
    claims = [
        piece("plain", 0, whole((3, 2)), "plain"),
        Piece(
            tensor="turned",
            region=((1, 2), (0, 2), (0, 3)),
            rank=0,
            parameter="turned",
            local_region=whole((3, 2)),
            fold=Fold((3, 2), (1, 0)),
        ),
        Piece(
            tensor="mixed",
            region=((0, 1), (0, 2), (0, 4)),
            rank=0,
            parameter="mixed",
            local_region=whole((4, 2)),
            fold=Fold((2, 2, 2), (2, 1, 0)),
        ),
    ]
    source = {
        "plain": torch.arange(6.0).view(3, 2),
        "turned": torch.arange(12.0).view(2, 2, 3),
        "mixed": torch.arange(8.0).view(1, 2, 4),
    }
    return claims, source


EXPECTED = {
    "plain": torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]),
    # Expert 1 has input features in rows: [[6, 7, 8], [9, 10, 11]].
    "turned": torch.tensor([[6.0, 9.0], [7.0, 10.0], [8.0, 11.0]]),
    # Gate and up alternate in columns: [[0, 1, 2, 3], [4, 5, 6, 7]]; gates first, then ups.
    "mixed": torch.tensor([[0.0, 4.0], [2.0, 6.0], [1.0, 5.0], [3.0, 7.0]]),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_puts_regions_where_the_folds_say_in_the_order_of_the_file(
    dtype: torch.dtype, threads: int
) -> None:
    claims, source = folded()
    parameters = {name: torch.full(value.shape, torch.nan, dtype=dtype) for name, value in EXPECTED.items()}
    store = Store(source)
    load_pieces(parameters, store, claims, threads)
    assert sorted(store.log) == ["mixed", "plain", "turned"]
    if threads == 1:
        assert store.log == ["mixed", "turned", "plain"]
    for name, value in EXPECTED.items():
        assert torch.equal(parameters[name].float(), value), name


def test_an_error_in_a_thread_is_the_loads() -> None:
    claims, source = folded()
    parameters = {name: torch.zeros(value.shape) for name, value in EXPECTED.items() if name != "plain"}
    with pytest.raises(KeyError, match="plain"):
        load_pieces(parameters, Store(source), claims, 2)


def test_save_writes_the_same_regions_and_commits_what_is_done() -> None:
    claims, source = folded()
    claims = [claim for claim in claims if claim.tensor != "turned"]
    tensors = [info("plain", 3, 2), info("mixed", 1, 2, 4)]
    plan = build_plan(tensors, claims)
    store = Store({tensor.name: torch.full(tensor.shape, torch.nan) for tensor in tensors})
    save_pieces(EXPECTED, store, plan.buckets(1), plan, 0)
    assert store.committed == store.log == ["plain", "mixed"]
    for tensor in tensors:
        assert torch.equal(store.read(tensor.name, region_of(tensor.shape)), source[tensor.name])
