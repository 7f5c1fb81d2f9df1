"""Loading into tensors that are already there."""

__all__ = ["Piece", "copy_into", "fill"]

from collections.abc import Sequence
from typing import NamedTuple

import torch

from aiockpt.loading.reading import Region, read_region, read_storage, tensor_view
from aiockpt.storage.base import ReadFile


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


def fill(file: ReadFile, region: Region, pieces: Sequence[Piece]) -> None:
    """Reads a region once, straight into its target where it has just one.

    Raises:
        CorruptCheckpointError: The bytes do not have the region's checksum; the
            content of the targets is then undefined.
        StorageError: The file system refused; the same holds.
    """
    first = pieces[0].target
    if len(pieces) == 1 and _is_image(pieces[0], region):
        read_region(file, region, tensor_view(first))
        if not first.is_inference():
            torch.autograd.graph.increment_version(first)
        return
    storage = read_storage(file, region)
    for target, offset, stride in pieces:
        source = torch.empty(0, dtype=target.dtype, device="cpu")
        source.set_(storage, offset, target.shape, stride)
        copy_into(target, source)


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Gives the target the source's elements; autograd does not record it."""
    with torch.no_grad():
        target.copy_(source)


def _is_image(piece: Piece, region: Region) -> bool:
    """Whether the target's memory is to be the region's bytes, all and in order."""
    target = piece.target
    return (
        target.device.type == "cpu"
        and target.is_contiguous()
        and not (target.is_conj() or target.is_neg())
        and target.nbytes == region.nbytes
        and _is_row_major(tuple(target.shape), piece.stride)
    )


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for size, distance in zip(reversed(shape), reversed(stride), strict=True):
        if size not in (0, 1) and distance != step:
            return False
        step *= size
    return True
