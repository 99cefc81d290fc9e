"""An engine's end of a sync: buckets of bytes become HF tensors again, each part held against its hash."""

from collections.abc import Callable, Collection, Iterable, Iterator

import torch
import xxhash

from bridge.fingerprint import fingerprint
from bridge.layouts import Region, region_of, region_shape, slices
from bridge.plan import TensorInfo
from bridge.sync_plan import Message, Part, SyncPlan, unit_of
from configs.errors import BasculeError


class ContentError(BasculeError):
    """Bytes that arrived are not those that were sent. Names the tensors, the rows and the rank."""


class Assembler:
    """Takes the buckets of one sync in order and gives tensors, grouped by unit, as soon as a unit is whole."""

    def __init__(
        self,
        plan: SyncPlan,
        units: Iterable[str] | None = None,
        key: Callable[[str], str] = unit_of,
    ) -> None:
        """`units` are those that this sync is about, by default all; `key` gives the unit of a tensor's name."""
        self._plan = plan
        self._key = key
        wanted = None if units is None else set(units)
        self._missing: dict[str, int] = {}
        self._left: dict[str, int] = {}
        for info in plan.tensors:
            unit = key(info.name)
            if wanted is None or unit in wanted:
                self._missing[info.name] = 0
                self._left[unit] = self._left.get(unit, 0) + 1
        for bucket in plan.buckets:
            for part in bucket.parts:
                if part.info.name in self._missing:
                    self._missing[part.info.name] += 1
        self._partial: dict[str, torch.Tensor] = {}
        self._whole: dict[str, list[tuple[str, torch.Tensor]]] = {}
        self._digest = xxhash.xxh3_64()

    @property
    def digest(self) -> int:
        """Hash of all part hashes so far, in the order of their bytes: what was received, in one number."""
        return self._digest.intdigest()

    @property
    def tensors(self) -> Collection[str]:
        """Names of the tensors that this sync is about."""
        return self._missing.keys()

    @property
    def missing(self) -> list[str]:
        """Tensors that have not come whole."""
        return [name for name, parts in self._missing.items() if parts]

    def add(
        self, number: int, buffer: torch.Tensor, *, with_hashes: bool = True
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Names and tensors of every unit that this bucket makes whole.

        Tensors are views of `buffer` where a part is a whole tensor, so it must not be written again. Raises
        ContentError before it gives anything when a hash does not fit.
        """
        bucket = self._plan.buckets[number]
        if with_hashes:
            self._check(number, buffer)
        finished: list[str] = []
        for part in bucket.parts:
            if part.info.name in self._missing:
                finished += self._take(part, buffer)
        for unit in finished:
            yield self._whole.pop(unit)

    def _take(self, part: Part, buffer: torch.Tensor) -> list[str]:
        """Put a part where it belongs; returns the unit when that completes it."""
        name, info = part.info.name, part.info
        content = buffer[part.start : part.start + part.nbytes].view(info.dtype)
        if part.region == region_of(info.shape):
            tensor = content.view(info.shape)
        else:
            if name not in self._partial:
                self._partial[name] = torch.empty(info.shape, dtype=info.dtype, device=buffer.device)
            tensor = self._partial[name]
            tensor[slices(part.region)].copy_(content.view(region_shape(part.region)))
        self._missing[name] -= 1
        if self._missing[name]:
            return []
        self._partial.pop(name, None)
        unit = self._key(name)
        self._whole.setdefault(unit, []).append((name, tensor))
        self._left[unit] -= 1
        return [] if self._left[unit] else [unit]

    def _check(self, number: int, buffer: torch.Tensor) -> None:
        wrong: list[str] = []
        for message in self._plan.buckets[number].messages:
            told = buffer[message.hashes_at : message.stop].view(torch.int64).tolist()
            for part, expected in zip(message.parts, told, strict=True):
                found = fingerprint(buffer[part.start : part.start + part.nbytes])
                self._digest.update(found.to_bytes(8, "little"))
                if found != expected % (1 << 64):
                    wrong.append(_describe(part.info, part.region, message))
        if wrong:
            more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ContentError(f"not what was sent: {', '.join(wrong[:8])}{more}")


def _describe(info: TensorInfo, region: Region, message: Message) -> str:
    box = "" if region == region_of(info.shape) else f" [{', '.join(f'{a}:{b}' for a, b in region)}]"
    return f"{info.name}{box} from trainer rank {message.rank}"
