"""Tensors as what they are in a file: a way of looking at a run of bytes."""

__all__ = ["View", "is_equal", "views"]

from collections.abc import Iterator
from typing import NamedTuple

import torch

from aiockpt.loading.container import Container, container_of
from aiockpt.loading.reading import Region, named, read_storage
from aiockpt.loading.safetensors_loading import read_header
from aiockpt.loading.torch_file import TorchFile
from aiockpt.outline import TensorOutline, leaves, tensors_in
from aiockpt.storage.base import ReadFile


class View(NamedTuple):
    """One tensor of an open file.

    Attributes:
        file: The file; must be open while bytes are compared.
        region: Where its bytes are; None for a meta tensor.
        dtype: Element type.
        shape: Size of each dimension `(ndim,)`.
        stride: Distance between neighbours, in elements `(ndim,)`.
        offset: First element, counted from the region's start in elements.
        nbytes: Bytes of its elements.
    """

    file: ReadFile
    region: Region | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int


def views(file: ReadFile) -> dict[str, View]:
    """Every tensor by key, named as `inspect_file` names them; errors as its."""
    with named(file):
        if container_of(file) is Container.SAFETENSORS:
            return dict(_safetensors_views(file))
        return dict(_torch_views(TorchFile(file)))


def is_equal(a: View, b: View) -> bool:
    """Whether two tensors of one dtype and shape have the same bytes.

    Told by checksums where these decide it; else both are read, and checked.
    """
    if a.region is None or b.region is None or not a.nbytes:
        return a.nbytes == b.nbytes
    crc32 = a.region.crc32
    is_alike = (a.stride, a.offset) == (b.stride, b.offset)
    if is_alike and a.region.nbytes == b.region.nbytes and crc32 is not None:
        if crc32 == b.region.crc32:
            return True
        if b.region.crc32 is not None and a.nbytes == a.region.nbytes:
            return False
    return torch.equal(_bytes(a, a.region), _bytes(b, b.region))


def _bytes(view: View, region: Region) -> torch.Tensor:
    # Elements as bytes, so that every dtype is compared as it stands: also what is
    # not equal to itself, and -0.0, which is equal to something else.
    width = view.dtype.itemsize
    shape = (*view.shape, width)
    stride = (*(step * width for step in view.stride), 1)
    flat = torch.empty(0, dtype=torch.uint8)
    return flat.set_(
        read_storage(view.file, region), view.offset * width, shape, stride
    )


def _safetensors_views(file: ReadFile) -> Iterator[tuple[str, View]]:
    for name, entry in read_header(file).entries.items():
        region = Region(name, entry.start, entry.nbytes, None)
        stride = torch.empty(entry.shape, device="meta").stride()
        yield (
            name,
            View(file, region, entry.dtype, entry.shape, stride, 0, entry.nbytes),
        )


def _torch_views(records: TorchFile) -> Iterator[tuple[str, View]]:
    for leaf in leaves(records.root):
        if isinstance(leaf.node, TensorOutline):
            yield leaf.key, _torch_view(records, leaf.key, leaf.node)
            continue
        for number, tensor in enumerate(tensors_in(leaf.node)):
            key = f"{leaf.key}#{number}"
            yield key, _torch_view(records, key, tensor)


def _torch_view(records: TorchFile, key: str, tensor: TensorOutline) -> View:
    region = None if tensor.storage_key is None else records.tensor_region(key, tensor)
    return View(
        file=records.file,
        region=region,
        dtype=tensor.dtype,
        shape=tensor.shape,
        stride=tensor.stride,
        offset=tensor.offset,
        nbytes=tensor.nbytes,
    )
