"""Targets that share memory: whether each element would be given one value only.

Targets are filled at the same time, in any order. An element that two of them have is
right afterwards only if both give it the same.

What is decided:

- Memory is compared by address, device by device, so that it does not matter by which
  storage object a target came to it. A target whose range of addresses meets no other
  takes no part in what follows.
- Targets may share elements where all of them are to be filled from one record and lie
  in memory as in the record, or where they are the same memory, seen alike, and are to
  receive the same elements (tied weights).
- Otherwise the elements are marked, in units as large as sizes, steps and distances
  allow (a fused matrix that is cut into blocks of columns has few). That is exact:
  targets that only stand between each other are fine.
- Above 4 Mi units, targets with the same outermost step are compared within one such
  step, as if each of them had all rows. What even then is too much counts as shared.

Of wrapper tensors the parts are looked at. Sparse and nested ones are not.
"""

__all__ = ["Overlap", "Source", "overlaps", "shares_elements"]

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Final, NamedTuple

import torch

from aiockpt.capturing.marks import wrapped_tensors
from aiockpt.weights import memory_of

# A mark is the number of the view that has it, in 32 bits: 16 MiB.
_MAX_MARKS: Final = 4 << 20


class Source(NamedTuple):
    """What a target is filled with: equal ones are the same elements.

    Attributes:
        origin: The record that has the elements, or its content, or what else tells
            them apart.
        offset: First element, from the record's start in elements.
        stride: As in the record, in elements `(ndim,)`; None where the origin is no
            record.
    """

    origin: Hashable
    offset: int = 0
    stride: tuple[int, ...] | None = None


class Overlap(NamedTuple):
    """Two targets that one load cannot fill.

    Attributes:
        key: One of them.
        other: The other.
        is_certain: Whether they share elements; else that was too much to tell, and
            others, connected with them by their ranges, may do so instead.
    """

    key: str
    other: str
    is_certain: bool


class _Range(NamedTuple):
    """The addresses between a tensor's first byte and its last."""

    start: int
    stop: int
    key: str
    tensor: torch.Tensor


class _View(NamedTuple):
    """Bytes of a range, in equal runs.

    Attributes:
        key: The target.
        start: Of the first run, from where the cluster begins.
        run: Bytes that follow each other.
        dims: Number of steps and their length in bytes, the longest last.
    """

    key: str
    start: int
    run: int
    dims: tuple[tuple[int, int], ...]

    @property
    def stop(self) -> int:
        """End of the last run, from where the cluster begins."""
        return (
            self.start + sum((size - 1) * step for size, step in self.dims) + self.run
        )

    def marks(self, marks: torch.Tensor, unit: int) -> torch.Tensor:
        """Those marks that are the view's."""
        sizes = [size for size, _ in self.dims]
        steps = [step // unit for _, step in self.dims]
        return marks.as_strided(
            [*sizes, self.run // unit], [*steps, 1], self.start // unit
        )


def overlaps(
    targets: Mapping[str, torch.Tensor], source_of: Callable[[str], Source]
) -> Iterator[Overlap]:
    """Yields targets that share elements which they would give different values.

    Of those whose ranges are connected it is one pair.

    Args:
        targets: Tensors none of which shares elements with itself, by key path.
        source_of: What one is to be filled with; asked only where ranges overlap.
    """
    ranges: dict[torch.device, list[_Range]] = {}
    for key, target in targets.items():
        for tensor in _with_memory(target):
            start = tensor.data_ptr()
            found = _Range(start, start + _span(tensor), key, tensor)
            ranges.setdefault(tensor.device, []).append(found)
    for group in ranges.values():
        for cluster in _clusters(group):
            overlap = _overlap(cluster, targets, source_of)
            if overlap is not None:
                yield overlap


def shares_elements(tensor: torch.Tensor) -> bool:
    """Whether two indices lead to the same element, or it is too much to tell."""
    if tensor.is_contiguous():
        return False
    span = 1
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    dims = sorted((step, size) for step, size in pairs if size > 1)
    is_nested = True
    for step, size in dims:
        is_nested &= step >= span
        span += (size - 1) * step
    if is_nested or not tensor.numel():
        return False
    unit = math.gcd(*(step for step, _ in dims))
    # With all steps in such units, that many different elements there can be.
    num_marks = (span - 1) // max(unit, 1) + 1
    if tensor.numel() > num_marks or num_marks > _MAX_MARKS:
        return True
    marks = torch.zeros(num_marks, dtype=torch.bool, device="cpu")
    steps = [step // unit for step, _ in dims]
    marks.as_strided([size for _, size in dims], steps).fill_(1)
    return int(marks.count_nonzero()) < tensor.numel()


def _with_memory(target: torch.Tensor) -> Iterator[torch.Tensor]:
    if hasattr(target, "__tensor_flatten__"):
        for part in wrapped_tensors(target).values():
            yield from _with_memory(part)
    elif target.layout is torch.strided and not (target.is_nested or target.is_meta):
        yield from (target,) if target.numel() else ()


def _span(tensor: torch.Tensor) -> int:
    if tensor.is_contiguous():
        return tensor.nbytes
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * step for size, step in pairs)
    return (last + 1) * tensor.itemsize


def _clusters(ranges: Iterable[_Range]) -> Iterator[list[_Range]]:
    """Those that overlapping ranges connect, where there are several, in order."""
    cluster: list[_Range] = []
    reach = 0
    for found in sorted(ranges, key=itemgetter(0)):
        if found.start >= reach:
            if len(cluster) > 1:
                yield cluster
            cluster = []
        cluster.append(found)
        reach = max(reach, found.stop)
    if len(cluster) > 1:
        yield cluster


def _overlap(
    cluster: Sequence[_Range],
    targets: Mapping[str, torch.Tensor],
    source_of: Callable[[str], Source],
) -> Overlap | None:
    groups: dict[Hashable, list[_View]] = {}
    for found in cluster:
        values = _values(source_of(found.key), targets[found.key])
        groups.setdefault(values, []).append(_view(found, cluster[0].start))
    if len(groups) == 1:
        return None
    views = list(groups.values())
    if _is_small(views):
        return _marked_twice(views)
    folded = _folded(views)
    if _is_small(folded):
        overlap = _marked_twice(folded)
        return overlap and overlap._replace(is_certain=False)
    (first, *_), (second, *_), *_ = views
    return Overlap(second.key, first.key, is_certain=False)


def _values(source: Source, target: torch.Tensor) -> Hashable:
    """What is equal where any elements that two targets share get the same values."""
    is_as_stored = not (target.is_conj() or target.is_neg())
    if source.stride is not None and is_as_stored:
        dims = zip(target.shape, target.stride(), source.stride, strict=True)
        if all(size == 1 or step == other for size, step, other in dims):
            # The record is laid over memory, wherever a target begins in both.
            return source.origin, target.data_ptr() - source.offset * target.itemsize
    memory = tuple(map(memory_of, _with_memory(target)))
    return source, memory, target.is_conj(), target.is_neg()


def _view(found: _Range, base: int) -> _View:
    itemsize = found.tensor.itemsize
    pairs = zip(found.tensor.stride(), found.tensor.shape, strict=True)
    run, dims = itemsize, list[tuple[int, int]]()
    for step, size in sorted((step * itemsize, size) for step, size in pairs):
        if size > 1 and step == run:
            run *= size
        elif size > 1:
            dims.append((size, step))
    return _View(found.key, found.start - base, run, tuple(dims))


def _unit(views: Iterable[_View]) -> int:
    """The largest number of bytes of which all is a multiple."""
    unit = 0
    for view in views:
        unit = math.gcd(unit, view.start, view.run, *(step for _, step in view.dims))
    return unit


def _is_small(groups: Iterable[Sequence[_View]]) -> bool:
    views = list(chain.from_iterable(groups))
    return max(view.stop for view in views) <= _MAX_MARKS * _unit(views)


def _folded(groups: list[list[_View]]) -> list[list[_View]]:
    """The views within one outermost step, where they have that in common."""
    views = list(chain.from_iterable(groups))
    steps = {view.dims[-1][1] if view.dims else 0 for view in views}
    period = steps.pop()
    if steps or not period:
        return groups
    folded = [
        [
            view._replace(start=view.start % period, dims=view.dims[:-1])
            for view in group
        ]
        for group in groups
    ]
    if max(view.stop for view in chain.from_iterable(folded)) > period:
        return groups
    return folded


def _marked_twice(groups: Sequence[Sequence[_View]]) -> Overlap | None:
    """The first two views of different groups that share bytes."""
    views = list(chain.from_iterable(groups))
    unit = _unit(views)
    num_marks = max(view.stop for view in views) // unit
    marks = torch.zeros(num_marks, dtype=torch.int32, device="cpu")
    number = 0
    for group in groups:
        own = [view.marks(marks, unit) for view in group]
        for view, part in zip(group, own, strict=True):
            other = int(part.max())
            if other:
                return Overlap(view.key, views[other - 1].key, is_certain=True)
        for part in own:
            number += 1
            part.fill_(number)
    return None
