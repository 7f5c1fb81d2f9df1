"""Loading into tensors that are already there."""

__all__ = ["Piece", "Target", "copy_into", "fill", "filling", "is_image"]

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch

from aiockpt.loading.reading import Region

# Of elements that do not follow each other in a device's memory, at once: torch makes
# room there for as many.
_PART_BYTES: Final = 4 << 20


class Target(NamedTuple):
    """Memory that the bytes of a region are copied to.

    Attributes:
        address: Where it begins.
        device: The device that has it; None for the host.
    """

    address: int
    device: int | None = None


class Piece(NamedTuple):
    """A tensor to be filled, and where in a region its elements stand.

    Attributes:
        target: A strided tensor with memory of its own. As many elements of its
            dtype as it has are in the region, at `offset` and `stride`.
        offset: First element, from the region's start in elements.
        stride: As in the region, in elements `(ndim,)`.
    """

    target: torch.Tensor
    offset: int
    stride: tuple[int, ...]


def is_image(piece: Piece, region: Region, device: int | None = None) -> bool:
    """Whether the target's memory is to be the region's bytes, all and in order.

    Args:
        piece: The target.
        region: The bytes.
        device: The device, other than the host, that has the target's memory.
    """
    target = piece.target
    return (
        (device is not None or target.device.type == "cpu")
        and target.is_contiguous()
        and not (target.is_conj() or target.is_neg())
        and target.nbytes == region.nbytes
        and _is_row_major(tuple(target.shape), piece.stride)
    )


def fill(
    piece: Piece, storage: torch.UntypedStorage, device: int | None = None
) -> None:
    """Gives a target its elements, from a storage that holds its region.

    Args:
        piece: The target.
        storage: The region's bytes, in host memory.
        device: The device, other than the host, that has the target's memory. No more
            of it is taken beside the target than a few MiB.
    """
    target = piece.target
    source = torch.empty(0, dtype=target.dtype, device="cpu")
    source.set_(storage, piece.offset, target.shape, piece.stride)
    with _changing(target):
        # Where it is not contiguous, torch needs room for what is copied at once.
        for part, elements in (
            [(target, source)] if device is None else _parts(target, source)
        ):
            part.copy_(elements)


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Gives the target the source's elements; autograd does not record it."""
    with _changing(target):
        target.copy_(source)


@contextmanager
def _changing(target: torch.Tensor) -> Generator[None]:
    # One that was made in inference mode can be changed nowhere else.
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        yield


@contextmanager
def filling(
    targets: Mapping[str, Sequence[torch.Tensor]],
    device_of: Callable[[torch.Tensor], int | None],
) -> Generator[dict[str, list[Target]]]:
    """Gives the memory of contiguous tensors that are written to meanwhile.

    Their memory stays where it is, even if a tensor is given other memory (as
    `Module.to` does); unless its storage is resized. Autograd learns of the change,
    also where the body fails half-way.
    """
    tensors = [target for group in targets.values() for target in group]
    storages = [target.untyped_storage() for target in tensors]
    try:
        yield {
            name: [Target(tensor.data_ptr(), device_of(tensor)) for tensor in group]
            for name, group in targets.items()
        }
    finally:
        storages.clear()
        for target in tensors:
            if not target.is_inference():
                torch.autograd.graph.increment_version(target)


def _parts(
    target: torch.Tensor, source: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    # In the order of the target's memory, so that what follows each other there does.
    order = sorted(range(target.ndim), key=target.stride, reverse=True)
    yield from _cut(target.permute(order), source.permute(order))


def _cut(
    target: torch.Tensor, source: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if target.nbytes <= _PART_BYTES or (
        target.is_contiguous() and source.is_contiguous()
    ):
        yield target, source
        return
    dim = next(dim for dim, size in enumerate(target.shape) if size > 1)
    for part, elements in zip(target.chunk(2, dim), source.chunk(2, dim), strict=True):
        yield from _cut(part, elements)


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for size, distance in zip(reversed(shape), reversed(stride), strict=True):
        if size not in (0, 1) and distance != step:
            return False
        step *= size
    return True
