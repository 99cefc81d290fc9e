"""Moves pieces between parameters and files, and between ranks on the way into a file.

A rank reads its own pieces by itself, and writes those that are ranges of a file. Pieces that are no range
(columns of a row-parallel matrix) are exchanged on a save: the ranks that share such a tensor split its rows among
them for the file, and swap the intersections of rows and pieces. Every rank knows both sides from the plan, so no
message carries anything but values, and all ranks pass the same tensors in the same order.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
import torch.distributed as dist

from bridge.layouts import (
    Region,
    intersect,
    is_contiguous,
    region_numel,
    region_shape,
    relative,
    slices,
)
from bridge.merged import LastKept
from bridge.plan import Bucket, Piece, Plan, TensorInfo

# A commit waits for the disk.
_COMMIT_BYTES = 512 << 20


class Reader(Protocol):
    """What loading needs of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name."""
        ...

    def position(self, name: str) -> tuple[str, int]:
        """File and offset."""
        ...

    def read(self, name: str, region: Region) -> torch.Tensor:
        """A region's values."""
        ...

    def read_into(self, name: str, region: Region, out: torch.Tensor) -> None:
        """The same, into `out`."""
        ...


class Writer(Protocol):
    """What saving needs of a checkpoint."""

    def write(self, name: str, region: Region, value: torch.Tensor) -> None:
        """Put values into a region."""
        ...

    def commit(self, names: Iterable[str]) -> None:
        """Note that this rank is done with these tensors."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A region of a tensor that is one range of its file, and the rank that reads or writes it."""

    tensor: str
    region: Region
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """What a piece and a block of the file have in common."""

    info: TensorInfo
    piece: Piece
    block: Block
    shared: Region

    @property
    def nbytes(self) -> int:
        """Bytes that travel when piece and block are of different ranks."""
        return region_numel(self.shared) * self.info.dtype.itemsize


def is_split_by_columns(info: TensorInfo, pieces: Iterable[Piece]) -> bool:
    """Whether some piece is not one range of the file."""
    return not all(is_contiguous(piece.region, info.shape) for piece in pieces)


def file_blocks(info: TensorInfo, pieces: Sequence[Piece]) -> tuple[Block, ...]:
    """Rows of the tensor (of each of its matrices, if it has three dimensions), shared by the pieces' ranks."""
    rows_at = len(info.shape) - 2
    blocks: list[Block] = []
    for lead, group in groupby(sorted(pieces, key=_lead), key=_lead):
        ranks = sorted({piece.rank for piece in group})
        rows, columns = info.shape[rows_at:]
        for number, rank in enumerate(ranks):
            start, stop = number * rows // len(ranks), (number + 1) * rows // len(ranks)
            if start < stop:
                region = (*lead, (start, stop), (0, columns))
                blocks.append(Block(tensor=info.name, region=region, rank=rank))
    return tuple(blocks)


def _lead(piece: Piece) -> Region:
    return piece.region[:-2]


def transfers(info: TensorInfo, pieces: Sequence[Piece]) -> tuple[Transfer, ...]:
    """Everything that moves between the pieces of a tensor and its file blocks, in one order for all ranks."""
    by_lead: dict[Region, list[Piece]] = {}
    for piece in pieces:
        by_lead.setdefault(_lead(piece), []).append(piece)
    return tuple(
        Transfer(info=info, piece=piece, block=block, shared=shared)
        for block in file_blocks(info, pieces)
        for piece in by_lead[block.region[:-2]]
        if (shared := intersect(block.region, piece.region)) is not None
    )


def as_bytes(value: torch.Tensor) -> torch.Tensor:
    """The values as uint8, in row-major order."""
    return value.contiguous().view(-1).view(torch.uint8)


def from_bytes(message: torch.Tensor, dtype: torch.dtype, region: Region) -> torch.Tensor:
    """Values of `dtype` in the shape of `region`. A part may begin at an odd offset of its message, where a
    typed view is not allowed; it is copied then.
    """
    aligned = message if message.storage_offset() % dtype.itemsize == 0 else message.clone()
    return aligned.view(dtype).view(region_shape(region))


def swap(
    outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, int], device: torch.device
) -> dict[int, torch.Tensor]:
    """Send each rank one message, receive one of known size from each rank; returns those by rank."""
    received = {
        rank: torch.empty(nbytes, dtype=torch.uint8, device=device) for rank, nbytes in incoming.items()
    }
    sends = [dist.P2POp(dist.isend, message, rank) for rank, message in outgoing.items()]
    receives = [dist.P2POp(dist.irecv, message, rank) for rank, message in received.items()]
    if sends or receives:
        for work in dist.batch_isend_irecv([*sends, *receives]):
            work.wait()
    return received


def _message(
    moves: Sequence[Transfer], value: Callable[[Transfer], torch.Tensor], device: torch.device
) -> torch.Tensor:
    """The values of the moves one after the other, as bytes."""
    message = torch.empty(sum(move.nbytes for move in moves), dtype=torch.uint8, device=device)
    start = 0
    for move in moves:
        part = message[start : start + move.nbytes]
        start += move.nbytes
        if part.storage_offset() % move.info.dtype.itemsize:
            part.copy_(as_bytes(value(move).to(move.info.dtype)))
        else:
            part.view(move.info.dtype).view(region_shape(move.shared)).copy_(value(move))
    return message


def _route(
    moves: Sequence[Transfer],
    rank: int,
    ends: Callable[[Transfer], tuple[int, int]],
    value: Callable[[Transfer], torch.Tensor],
    device: torch.device,
) -> Iterator[tuple[Transfer, torch.Tensor]]:
    """Every move that ends at this rank with its values. `ends` says from which rank to which one it goes."""
    outgoing: dict[int, list[Transfer]] = {}
    incoming: dict[int, list[Transfer]] = {}
    for move in moves:
        source, target = ends(move)
        if source == rank != target:
            outgoing.setdefault(target, []).append(move)
        elif target == rank != source:
            incoming.setdefault(source, []).append(move)
    messages = {target: _message(going, value, device) for target, going in outgoing.items()}
    sizes = {source: sum(move.nbytes for move in coming) for source, coming in incoming.items()}
    for source, message in swap(messages, sizes, device).items():
        coming = incoming[source]
        for move, part in zip(coming, message.split([move.nbytes for move in coming]), strict=True):
            yield move, from_bytes(part, move.info.dtype, move.shared)
    for move in moves:
        if ends(move) == (rank, rank):
            yield move, value(move)


def reading_threads(device: torch.device) -> int:
    """How many threads a rank reads with: two, where the machine has the cores for it."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else dist.get_world_size()
    return 2 if len(os.sched_getaffinity(0)) >= 2 * ranks else 1


def load_pieces(
    parameters: Mapping[str, torch.Tensor], reader: Reader, pieces: Iterable[Piece], threads: int = 1
) -> None:
    """Read a rank's pieces into its parameters, in the order of the files.

    The `reader` must let several threads read at once.
    """
    ordered = iter(sorted(pieces, key=lambda piece: (reader.position(piece.tensor), piece.region)))

    def read() -> None:
        for piece in ordered:
            _read_piece(reader, piece, parameters[piece.parameter])

    # The next of a list's iterator goes to one of them alone.
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(read) for _ in range(threads)]:
            done.result()


def _read_piece(reader: Reader, piece: Piece, parameter: torch.Tensor) -> None:
    place = _place(piece, parameter)
    if place is not None:
        reader.read_into(piece.tensor, piece.region, place)
    else:
        piece.put(parameter, reader.read(piece.tensor, piece.region))


def _place(piece: Piece, parameter: torch.Tensor) -> torch.Tensor | None:
    """Where the piece goes, as a view of the parameter in the shape of the HF region; None if there is none.

    The region may have a dimension of one more, for the expert; a fold may even mix dimensions.
    """
    shape, target = region_shape(piece.region), piece.target(parameter)
    if target.shape == shape:
        return target
    same = [side for side in shape if side > 1] == [side for side in target.shape if side > 1]
    return target.view(shape) if same else None


def save_pieces(
    parameters: Mapping[str, torch.Tensor],
    writer: Writer,
    buckets: Iterable[Bucket],
    plan: Plan,
    rank: int,
) -> None:
    """Write what this rank owns of the `buckets` under `plan`. Every rank must call it with the same ones."""
    parameters = LastKept(parameters)
    done: list[str] = []
    size = 0
    for bucket in buckets:
        moves: list[Transfer] = []
        for info in bucket.tensors:
            pieces = plan.pieces[info.name]
            if is_split_by_columns(info, pieces):
                moves.extend(transfers(info, pieces))
                continue
            for piece in pieces:
                if piece.rank == rank:
                    writer.write(info.name, piece.region, piece.get(parameters[piece.parameter]))
        _save_split(parameters, writer, moves, rank)
        done += [info.name for info in bucket.tensors]
        size += bucket.nbytes
        if size >= _COMMIT_BYTES:
            writer.commit(done)
            done, size = [], 0
    writer.commit(done)


def _save_split(
    parameters: Mapping[str, torch.Tensor], writer: Writer, moves: Sequence[Transfer], rank: int
) -> None:
    blocks = {
        move.block: torch.empty(region_shape(move.block.region), dtype=move.info.dtype)
        for move in moves
        if move.block.rank == rank
    }

    def value(move: Transfer) -> torch.Tensor:
        whole = move.piece.get(parameters[move.piece.parameter])
        return whole[slices(relative(move.shared, move.piece.region))]

    device = next(iter(parameters.values())).device
    for move, part in _route(moves, rank, lambda move: (move.piece.rank, move.block.rank), value, device):
        blocks[move.block][slices(relative(move.shared, move.block.region))].copy_(part)
    for block, rows in blocks.items():
        writer.write(block.tensor, block.region, rows)
