"""What a weight loader does, as data: which elements of which tensor it copied to where.

A loader is watched while it runs. Where all that it does to a parameter is to copy elements of tensors that it was
given, the copies can be made again with other values, without the loader.
"""

from bisect import bisect_right
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_COPY = torch.ops.aten.copy_.default
_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)
_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Some elements of a tensor: sizes, strides, and the distance of the first one from the tensor's own first."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These elements of `tensor`, in its memory."""
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A tensor of a model: the layer that holds it, and its name there."""

    layer: str
    tensor: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Elements of an HF tensor go to elements of a model's tensor, of the same shape; types may differ."""

    source: str
    taken: View
    place: Place
    put: View

    @property
    def numel(self) -> int:
        """How many elements."""
        return torch.Size(self.put.shape).numel()


class CopyWatch(TorchDispatchMode):
    """Notes what is done to some tensors while it is entered and `watching`.

    `copies` and `fills` are what could be done again. A place in `refused` was written in another way, by an
    operation or from memory that is not of a known source, or by a loader that looks at values. `read` is whether
    values were looked at outside loaders.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[Place, dict[Copy, None]] = {}
        self.fills: dict[Place, dict[View, None]] = {}
        self.refused: set[Place] = set()
        self.read = False
        self._of_loader = False
        self._sources: Sequence[tuple[int, str, torch.Tensor]] = ()
        self._targets: Mapping[int, tuple[Place, torch.Tensor]] = {}

    @contextmanager
    def watching(
        self,
        sources: Sequence[tuple[str, torch.Tensor]],
        targets: Iterable[tuple[Place, torch.Tensor]],
        *,
        of_loader: bool = False,
    ) -> Generator[None]:
        """In the body, what is copied from `sources`, all of them contiguous, to `targets`.

        `of_loader`: the body runs only the loaders of these targets.
        """
        before = self._sources, self._targets, self._of_loader
        self._of_loader = of_loader
        self._sources = sorted(
            ((tensor.data_ptr(), name, tensor) for name, tensor in sources if tensor.numel()),
            key=itemgetter(0),
        )
        self._targets = {
            tensor.untyped_storage().data_ptr(): (place, tensor)
            for place, tensor in targets
            if not tensor.is_meta and tensor.numel()
        }
        try:
            yield
        finally:
            self._sources, self._targets, self._of_loader = before

    @contextmanager
    def looking_away(self) -> Generator[None]:
        """In the body nothing is noted."""
        with self.watching((), ()):
            yield

    def source_of(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """The source in whose memory the tensor is, with its name."""
        if tensor.is_meta or not tensor.numel():
            return None
        start = tensor.data_ptr()
        after = bisect_right(self._sources, start, key=itemgetter(0))
        if not after:
            return None
        at, name, source = self._sources[after - 1]
        return (name, source) if start < at + source.nbytes and source.dtype == tensor.dtype else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the operation, then do it."""
        kwargs = kwargs or {}
        if self._sources:
            self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if func in _READS and self._of_loader:
            # What is done next may depend on it.
            self.refused.update(place for place, _ in self._targets.values())
        elif func in _READS:
            self.read = True
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor):
                    self._note_write(func, args, tensor)

    def _note_write(self, func: Any, args: tuple[Any, ...], written: torch.Tensor) -> None:
        if written.is_meta:
            return
        found = self._targets.get(written.untyped_storage().data_ptr())
        if found is None:
            return
        place, target = found
        put = _view(written, int(target.storage_offset()))
        source = self.source_of(args[1]) if func is _COPY else None
        if func in _FILLS:
            self.fills.setdefault(place, {})[put] = None
        elif source is None or written.dtype != target.dtype or args[1].numel() != written.numel():
            self.refused.add(place)
        else:
            name, tensor = source
            taken = _view(args[1].expand(written.shape), int(tensor.storage_offset()))
            copy = Copy(source=name, taken=taken, place=place, put=put)
            self.copies.setdefault(place, {})[copy] = None


def _view(tensor: torch.Tensor, origin: int) -> View:
    return View(
        shape=tuple(tensor.shape), strides=tensor.stride(), offset=int(tensor.storage_offset()) - origin
    )


def fills_once(tensor: torch.Tensor, views: Sequence[View]) -> bool:
    """Whether each element of the tensor is in just one of the views."""
    numel = tensor.numel()
    if not _is_dense(tensor) or sum(torch.Size(view.shape).numel() for view in views) != numel:
        return False
    seen = torch.zeros(numel, dtype=torch.bool)
    for view in views:
        reach = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        if view.offset < 0 or view.offset + reach >= numel:
            return False
        view.of(seen).fill_(True)
    return bool(seen.all())


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements are one run of memory, in any order."""
    span = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if stride != span:
                return False
            span *= size
    return span == tensor.numel()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one type hold the same bytes, NaN or not."""
    return left.shape == right.shape and torch.equal(
        left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
    )
