"""From captured state to a file's image: which bytes stand where, and their sources."""

__all__ = ["FilePlan", "make_plan"]

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aiockpt.capture import Capture
from aiockpt.errors import InvalidArgumentError
from aiockpt.formats import plain, safetensors, torch_zip
from aiockpt.formats.plain import PlainBytes
from aiockpt.image import Chunk, Layout, chunks
from aiockpt.pickling import Span
from aiockpt.recent_pickles import pickle_like_before


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A whole file, known before a byte of it is copied.

    Attributes:
        nbytes: The file's exact length.
        num_records: Records in it.
        chunks: Its image, cut for staging.
        sources: Where each record's bytes come from. It holds the storages alive;
            whoever stages them empties it afterwards.
    """

    nbytes: int
    num_records: int
    chunks: Sequence[Chunk]
    sources: list[bytes | Span]


def make_plan(
    capture: Capture, path: str, metadata: Mapping[str, str] | None, chunk_bytes: int
) -> FilePlan:
    """Plans the file at `path`, whose suffix picks the container.

    `PlainBytes` have one of their own, whatever the suffix. Touches no tensor data.
    May take a millisecond per 100 tensors: run it in a worker.

    Raises:
        InvalidArgumentError: The state cannot be pickled, or not be held by the
            container; the message names the key.
    """
    if isinstance(capture.tree, PlainBytes):
        return _plan_plain(capture.tree, chunk_bytes)
    if path.endswith(".safetensors"):
        return _plan_safetensors(capture, metadata, chunk_bytes)
    if metadata is not None:
        message = f"metadata is for .safetensors files, not for {path!r}"
        raise InvalidArgumentError(message)
    pickled = pickle_like_before(capture.tree)
    sizes = (len(pickled.data), *(span.nbytes for span in pickled.spans))
    nbytes, pieces = _zip_chunks(sizes, chunk_bytes)
    return FilePlan(nbytes, len(sizes), pieces, [pickled.data, *pickled.spans])


# Saves of one run differ in values, rarely in sizes: their images are the same.
@functools.lru_cache(maxsize=8)
def _zip_chunks(sizes: tuple[int, ...], chunk_bytes: int) -> tuple[int, list[Chunk]]:
    layout = torch_zip.layout(sizes)
    return layout.nbytes, list(chunks(layout, chunk_bytes))


def _plan_plain(state: PlainBytes, chunk_bytes: int) -> FilePlan:
    nbytes = len(state.data)
    pieces = list(chunks(plain.layout(nbytes), chunk_bytes))
    return FilePlan(nbytes, 1, pieces, [state.data])


def _plan_safetensors(
    capture: Capture, metadata: Mapping[str, str] | None, chunk_bytes: int
) -> FilePlan:
    if not isinstance(capture.tree, Mapping):
        message = "a .safetensors file holds a flat dict of tensors"
        raise InvalidArgumentError(message)
    layout: Layout
    layout, tensors = safetensors.plan(capture.tree, metadata)
    sources: list[bytes | Span] = [
        Span(
            tensor.untyped_storage(),
            int(tensor.storage_offset()) * tensor.element_size(),
            tensor.nbytes,
        )
        for _, tensor in tensors
    ]
    return FilePlan(
        layout.nbytes, len(sources), list(chunks(layout, chunk_bytes)), sources
    )
