"""How a Megatron shard is cut out of Hugging Face tensors. Pure arithmetic on shapes.

A layout answers one question: which region of which HF tensor is which region of this rank's parameter?
Loading, saving, syncing and checking all follow from the answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

S = TypeVar("S")
Shape = tuple[int, ...]
Region = tuple[tuple[int, int], ...]
"""[start, stop) in every dimension."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Position in the group that shares the parameter, and the sizes of the model that layouts need.

    `rank` and `size` are of the tensor-parallel group, for a parameter of an expert of the expert-tensor-
    parallel one. `expert` is the global number of that expert. `padded_vocab_size` is what the model's
    embedding was padded to, by default the least that the ranks divide.
    """

    rank: int
    size: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    padded_vocab_size: int | None = None
    num_experts: int = 0
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Fold:
    """Turns a box of the parameter into a box of the HF tensor: view as `split`, permute by `order`, flatten."""

    split: Shape
    order: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """`hf_region` of the rule's HF tensor number `source` is `local_region` of the parameter.

    Without a fold both have the same elements in the same order (the HF region may have more dimensions).
    """

    source: int
    hf_region: Region
    local_region: Region
    fold: Fold | None = None


class Layout(Protocol):
    """One way of cutting."""

    @property
    def parallel_dim(self) -> int | None:
        """Dimension of the parameter that Megatron splits over the group; None when every rank has a copy."""
        ...

    def shapes(self, local: Shape, shard: Shard) -> tuple[Shape, ...]:
        """Full shapes of the rule's HF tensors, from the shape of the rank's parameter."""
        ...

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """Cuts of this shard, given the full shapes of the rule's HF tensors."""
        ...


def region_of(shape: Shape) -> Region:
    """The region that is the whole tensor."""
    return tuple([(0, size) for size in shape])


def region_shape(region: Region) -> Shape:
    """Sizes of a region."""
    return tuple([stop - start for start, stop in region])


def region_numel(region: Region) -> int:
    """Number of elements in a region."""
    return math.prod(region_shape(region))


def slices(region: Region) -> tuple[slice, ...]:
    """The region as an index."""
    return tuple([slice(start, stop) for start, stop in region])


def intersect(one: Region, other: Region) -> Region | None:
    """What two regions of a tensor share, if anything."""
    shared = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(one, other, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def relative(region: Region, origin: Region) -> Region:
    """The region in coordinates of the box `origin` that contains it."""
    return tuple((start - at, stop - at) for (start, stop), (at, _) in zip(region, origin, strict=True))


def is_contiguous(region: Region, shape: Shape) -> bool:
    """Whether the region of a tensor of `shape` is one range of its elements, in row-major order."""
    partial = [dim for dim, side in enumerate(region) if side != (0, shape[dim])]
    if not partial:
        return True
    return all(stop - start == 1 for start, stop in region[: partial[-1]])


def padded_vocabulary(vocabulary: int, tensor_parallel_size: int) -> int:
    """The least multiple of the tensor-parallel size that holds the vocabulary."""
    return -(-vocabulary // tensor_parallel_size) * tensor_parallel_size


def _rows(shape: Shape, start: int, stop: int) -> Region:
    return ((start, stop), *region_of(shape[1:]))


def _block(count: int, shard: Shard) -> tuple[int, int]:
    """This rank's part of `count` things that divide evenly."""
    size = count // shard.size
    return shard.rank * size, (shard.rank + 1) * size


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank has the whole tensor: norms, biases of row-parallel layers, routers."""

    parallel_dim = None

    def shapes(self, local: Shape, shard: Shard) -> tuple[Shape, ...]:
        """The parameter's own."""
        return (local,)

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """The whole tensor."""
        whole = region_of(shapes[0])
        return (Cut(source=0, hf_region=whole, local_region=whole),)


@dataclass(frozen=True, slots=True)
class Column:
    """Equal row ranges: Megatron's column-parallel layers split the output features.

    Where Megatron keeps the parameter whole (Transformer Engine's duplicated linears) it is Replicated.
    """

    parallel_dim = 0

    def shapes(self, local: Shape, shard: Shard) -> tuple[Shape, ...]:
        """Rows of all ranks."""
        return ((local[0] * shard.size, *local[1:]),)

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """One row range."""
        start, stop = _block(shapes[0][0], shard)
        return (
            Cut(
                source=0,
                hf_region=_rows(shapes[0], start, stop),
                local_region=_rows(shapes[0], 0, stop - start),
            ),
        )


@dataclass(frozen=True, slots=True)
class Row:
    """Equal column ranges: Megatron's row-parallel layers split the input features."""

    parallel_dim = 1

    def shapes(self, local: Shape, shard: Shard) -> tuple[Shape, ...]:
        """Columns of all ranks."""
        return ((local[0], local[1] * shard.size),)

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """One column range."""
        rows, columns = shapes[0]
        start, stop = _block(columns, shard)
        return (
            Cut(
                source=0,
                hf_region=((0, rows), (start, stop)),
                local_region=((0, rows), (0, stop - start)),
            ),
        )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Equal row ranges of the vocabulary after padding it to a multiple of the group; padding has no cut."""

    parallel_dim = 0

    def shapes(self, local: Shape, shard: Shard) -> tuple[Shape, ...]:
        """The vocabulary without padding."""
        return ((shard.vocab_size, *local[1:]),)

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """One row range, shorter on a rank that also holds padding; none on one that holds only that."""
        vocabulary = shapes[0][0]
        padded = shard.padded_vocab_size or padded_vocabulary(vocabulary, shard.size)
        start, stop = _block(padded, shard)
        stop = min(stop, vocabulary)
        if start >= stop:
            return ()
        return (
            Cut(
                source=0,
                hf_region=_rows(shapes[0], start, stop),
                local_region=_rows(shapes[0], 0, stop - start),
            ),
        )


@dataclass(frozen=True, slots=True)
class GateUp:
    """Gate and up projections, [gate rows of this rank; up rows of this rank].

    `fused`: one HF tensor holds all gate rows, then all up rows.
    """

    fused: bool = False
    parallel_dim = 0

    def shapes(self, local: Shape, shard: Shard) -> tuple[Shape, ...]:
        """Of gate and up, or of both together."""
        rows = local[0] * shard.size
        return ((rows, *local[1:]),) if self.fused else ((rows // 2, *local[1:]),) * 2

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """A row range of gate and the same one of up."""
        height = shapes[0][0] // 2 if self.fused else shapes[0][0]
        start, stop = _block(height, shard)
        rows = stop - start
        return tuple(
            Cut(
                source=0 if self.fused else half,
                hf_region=_rows(shapes[0], start + shift, stop + shift),
                local_region=_rows(shapes[0], half * rows, (half + 1) * rows),
            )
            for half, shift in ((0, 0), (1, height if self.fused else 0))
        )


@dataclass(frozen=True, slots=True)
class QKV:
    """Attention inputs, per query group: its query heads, its key head, its value head.

    A tensor-parallel size above the number of query groups cuts through groups; each rank then holds a part
    of one, which may be query heads only. `fused`: one HF tensor holds all q rows, then k, then v.
    """

    fused: bool = False
    parallel_dim = 0

    def shapes(self, local: Shape, shard: Shard) -> tuple[Shape, ...]:
        """Of q, k and v, or of all three together."""
        rows = local[0] * shard.size
        if self.fused:
            return ((rows, *local[1:]),)
        keys = shard.num_query_groups * shard.head_dim
        return tuple((height, *local[1:]) for height in (rows - 2 * keys, keys, keys))

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """Row ranges of q, k and v, by group."""
        keys = shard.num_query_groups * shard.head_dim
        total = shapes[0][0] if self.fused else shapes[0][0] + 2 * keys
        queries = (total - 2 * keys) // shard.num_query_groups
        first, last = _block(total, shard)
        found: list[Cut] = []
        position = 0
        for group in range(shard.num_query_groups):
            for part, height in enumerate((queries, shard.head_dim, shard.head_dim)):
                start, stop = max(position, first), min(position + height, last)
                if start < stop:
                    shift = group * height - position
                    if self.fused:
                        shift += (0, total - 2 * keys, total - keys)[part]
                    found.append(
                        Cut(
                            source=0 if self.fused else part,
                            hf_region=_rows(shapes[0], start + shift, stop + shift),
                            local_region=_rows(shapes[0], start - first, stop - first),
                        )
                    )
                position += height
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Packed:
    """One expert's part of an HF tensor that holds all experts along its first dimension.

    `inner` is how the expert's own tensor is cut. `transposed`: the HF tensor has input features before
    output features.
    """

    inner: Layout
    transposed: bool = False

    @property
    def parallel_dim(self) -> int | None:
        """That of the inner layout."""
        return self.inner.parallel_dim

    def shapes(self, local: Shape, shard: Shard) -> tuple[Shape, ...]:
        """The inner shapes, for all experts."""
        return tuple((shard.num_experts, *self._turn(shape)) for shape in self.inner.shapes(local, shard))

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """The inner cuts, at this expert."""
        assert shard.expert is not None, "only parameters of experts are packed"
        expert = (shard.expert, shard.expert + 1)
        return tuple(
            Cut(
                source=cut.source,
                hf_region=(expert, *self._turn(cut.hf_region)),
                local_region=cut.local_region,
                fold=Fold(region_shape(cut.local_region), (1, 0)) if self.transposed else None,
            )
            for cut in self.inner.cuts([self._turn(shape[1:]) for shape in shapes], shard)
        )

    def _turn(self, sides: tuple[S, ...]) -> tuple[S, ...]:
        return sides[::-1] if self.transposed else sides


@dataclass(frozen=True, slots=True)
class PackedInterleavedGateUp:
    """gpt_oss: all experts, input features first, gate and up alternating: [E, H, 2 I], its bias [E, 2 I]."""

    parallel_dim = 0

    def shapes(self, local: Shape, shard: Shard) -> tuple[Shape, ...]:
        """[E, H, 2 I] of a weight, [E, 2 I] of a bias."""
        return ((shard.num_experts, *local[1:], local[0] * shard.size),)

    def cuts(self, shapes: Sequence[Shape], shard: Shard) -> tuple[Cut, ...]:
        """One range of pairs, folded into gate rows and up rows."""
        assert shard.expert is not None, "only parameters of experts are packed"
        *between, width = shapes[0][1:]
        start, stop = _block(width, shard)
        rows = stop - start
        local = (rows, *between)
        split = (2, rows // 2, *between)
        return (
            Cut(
                source=0,
                hf_region=((shard.expert, shard.expert + 1), *region_of(tuple(between)), (start, stop)),
                local_region=region_of(local),
                fold=Fold(split, tuple(reversed(range(len(split))))),
            ),
        )
