"""What a file or a tag holds: the tensors, and which of them share bytes."""

__all__ = ["Contents", "FileContents", "Tensor", "contents"]

from pathlib import Path

import msgspec

from aiockpt.cli.places import Kind, Place, is_plain, manifest_of, opened
from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.loader import FileInfo, inspect_file
from aiockpt.manifest import FileEntry


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor.

    Attributes:
        key: Its key path in the saved object.
        dtype: Element type, without `torch.`.
        shape: Size of each dimension `(ndim,)`.
        nbytes: Bytes of its elements.
        record: Name of the record that holds them; None for a meta tensor.
        shared_with: Key of the first tensor in the same record, if that is another.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    record: str | None
    shared_with: str | None


class FileContents(msgspec.Struct, frozen=True, kw_only=True):
    """One file.

    Attributes:
        path: Relative to the tag, or the file's name.
        container: `"torch"`, `"safetensors"`, or `"plain"` for other files of a tag.
        nbytes: Its length.
        tensor_bytes: Bytes of its tensors, those that share bytes counted in full.
        record_bytes: Bytes of the records that hold them.
        num_objects: Values in it that are no tensors.
        tensors: In the order of the saved object.
    """

    path: str
    container: str
    nbytes: int
    tensor_bytes: int
    record_bytes: int
    num_objects: int
    tensors: list[Tensor]


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """A file, or all files of a tag."""

    path: str
    tag: str | None
    files: list[FileContents]


def contents(place: Place) -> Contents:
    """Describes a file or a tag without reading its tensors' bytes.

    Raises:
        InvalidArgumentError: It is a root, or no checkpoint.
        CorruptCheckpointError: What describes the tensors is damaged.
    """
    path = place.path
    if place.kind is Kind.ROOT:
        message = f"{str(path)!r} is neither a file nor a tag: name one below it"
        raise InvalidArgumentError(message)
    if place.kind is Kind.FILE:
        with opened(path.parent, path.name) as file:
            described = _describe(path.name, inspect_file(file))
        return Contents(path=str(path), tag=None, files=[described])
    manifest = manifest_of(path)
    files = [_describe_entry(path, entry) for entry in manifest.local_files]
    return Contents(path=str(path), tag=manifest.tag, files=files)


def _describe_entry(tag_dir: Path, entry: FileEntry) -> FileContents:
    try:
        with opened(tag_dir, entry.path) as file:
            return _describe(entry.path, inspect_file(file))
    except (CorruptCheckpointError, InvalidArgumentError):
        if not is_plain(tag_dir, entry):
            raise
    return FileContents(
        path=entry.path,
        container="plain",
        nbytes=entry.nbytes,
        tensor_bytes=0,
        record_bytes=0,
        num_objects=0,
        tensors=[],
    )


def _describe(path: str, info: FileInfo) -> FileContents:
    used = {tensor.record for tensor in info.tensors}
    return FileContents(
        path=path,
        container=info.container.value,
        nbytes=info.nbytes,
        tensor_bytes=sum(tensor.nbytes for tensor in info.tensors),
        record_bytes=sum(r.nbytes for r in info.records if r.name in used),
        num_objects=info.num_objects,
        tensors=[
            Tensor(
                key=tensor.key,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tensor.shape,
                nbytes=tensor.nbytes,
                record=tensor.record,
                shared_with=tensor.shared_with,
            )
            for tensor in info.tensors
        ],
    )
