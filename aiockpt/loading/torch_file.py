"""A torch zip opened for reading: which record stands where."""

__all__ = ["PICKLE_RECORD", "TorchFile", "storage_record"]

from collections.abc import Generator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Final

from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.formats.zip_directory import (
    Directory,
    Entry,
    data_offset,
    parse_directory,
)
from aiockpt.formats.zip_end import TAIL_BYTES, DirectorySpan, find_directory
from aiockpt.loading.reading import Region, checksum_mismatch, named, read_bytes
from aiockpt.loading.selecting import tensors_by_key
from aiockpt.outline import TensorOutline, leaves, outline, storage_keys
from aiockpt.storage.base import ReadFile

PICKLE_RECORD: Final = "data.pkl"
# torch/csrc: caffe2/serialize/versions.h, kMaxSupportedFileFormatVersion.
_MAX_VERSION: Final = 10
_MAX_VERSION_DIGITS: Final = 2
_MAX_NOTE_BYTES: Final = 4096
# What torch pads records to, unless it is told otherwise.
_ALIGNMENT_BYTES: Final = 64
_MAX_ALIGNMENT_DIGITS: Final = 5


def storage_record(key: str) -> str:
    """Name of the record that holds a storage."""
    return f"data/{key}"


class TorchFile:
    """The records of a torch zip; the directory has been read and checked.

    Attributes:
        file: The file, owned by the caller.
        entries: The records by name, without the archive's name.
        is_summed: Whether the file has checksums. torch can be told to leave
            them out, and then writes 0 for all.
    """

    def __init__(self, file: ReadFile, *, verify: bool = True) -> None:
        """Reads the directory.

        Raises:
            CorruptCheckpointError: The file is cut off, malformed or compressed, or
                has no pickle.
            InvalidArgumentError: The file needs another reader; the message says
                which.
        """
        self.file = file
        with named(file):
            self.entries: Mapping[str, Entry] = _read_directory(file).entries
        self.is_summed = any(entry.crc32 for entry in self.entries.values())
        self._is_verified = verify and self.is_summed
        self._regions: dict[str, Region] = {}
        if PICKLE_RECORD not in self.entries:
            text = f"{file.path}: there is no {PICKLE_RECORD} in this zip file"
            raise CorruptCheckpointError(text, path=file.path)
        self._alignment = _ALIGNMENT_BYTES
        self._alignment = self._read_alignment()
        self._check_origin()

    def region(self, name: str) -> Region:
        """Returns where a record's bytes stand.

        Reads its local header only where the directory leaves that open; whoever
        reads the bytes holds the header against the directory.

        Raises:
            CorruptCheckpointError: There is no such record, or its local header
                does not agree with the directory.
        """
        known = self._regions.get(name)
        if known is not None:
            return known
        entry = self.entries.get(name)
        if entry is None:
            text = f"{self.file.path}: the record {name!r} is missing"
            raise CorruptCheckpointError(text, path=self.file.path)
        offset = entry.expected_offset(self._alignment)
        if offset is None:
            header = bytearray(entry.header_nbytes)
            self.file.read_into(entry.header_offset, memoryview(header))
            with named(self.file):
                offset = data_offset(entry, bytes(header))
        crc32 = entry.crc32 if self._is_verified else None
        region = Region(name, offset, entry.nbytes, crc32, entry)
        self._regions[name] = region
        return region

    def storage_region(self, key: str, nbytes: int) -> Region:
        """Returns where a storage of `nbytes` bytes stands.

        Raises:
            CorruptCheckpointError: As `region`; or the record has another length.
        """
        region = self.region(storage_record(key))
        if region.nbytes != nbytes:
            text = (
                f"{self.file.path}: the record {region.name!r} has {region.nbytes} "
                f"bytes, but the pickle describes a storage of {nbytes}"
            )
            path = self.file.path
            raise CorruptCheckpointError(text, path=path, offset=region.offset)
        return region

    def tensor_region(self, key: str, tensor: TensorOutline) -> Region:
        """Returns where the storage of a tensor stands.

        Args:
            key: The tensor's key path, for messages.
            tensor: A tensor that has a storage.

        Raises:
            CorruptCheckpointError: As `storage_region`; or the tensor reaches
                beyond the storage.
        """
        storage_key = tensor.storage_key or ""
        with self.keyed(storage_record(storage_key)):
            region = self.storage_region(storage_key, tensor.storage_nbytes)
        if tensor.stop_bytes > region.nbytes:
            path, offset = self.file.path, region.offset
            text = f"{path}: {key!r} reaches beyond the record {region.name!r}"
            raise CorruptCheckpointError(text, path=path, key=key, offset=offset)
        return region

    def read(self, name: str) -> bytes:
        """Returns a record's bytes, checked; errors as those of `region`."""
        return read_bytes(self.file, self.region(name))

    @cached_property
    def pickle(self) -> bytes:
        """The pickle, checked; errors as those of `read`."""
        return self.read(PICKLE_RECORD)

    @cached_property
    def root(self) -> object:
        """What the pickle describes; errors also as those of `outline`."""
        with named(self.file):
            return outline(self.pickle)

    @cached_property
    def tensors(self) -> tuple[Mapping[str, object], AbstractSet[str]]:
        """The tensors in it by key path, and the key paths that two of them have."""
        return tensors_by_key(self.root)

    def mismatch(self, region: Region) -> CorruptCheckpointError:
        """The error for a record without its checksum; names the tensor if it can."""
        try:
            with self.keyed(region.name):
                raise checksum_mismatch(self.file, region)
        except CorruptCheckpointError as error:
            return error

    @contextmanager
    def keyed(self, record: str) -> Generator[None]:
        """Names the tensor in errors about the record, where it can be told."""
        try:
            yield
        except CorruptCheckpointError as error:
            if error.key is None and (key := self._key_of(record)) is not None:
                text = f"{error} (tensor {key!r})"
                raise CorruptCheckpointError(
                    text, path=error.path, key=key, offset=error.offset
                ) from error
            raise

    def _key_of(self, record: str) -> str | None:
        """Key path of the first tensor that uses the record, if it can be told."""
        with suppress(CorruptCheckpointError):
            for leaf in leaves(self.root):
                if record in map(storage_record, storage_keys(leaf.node)):
                    return leaf.key
        return None

    def notes(self) -> dict[str, str]:
        """Returns the small records beside pickle and storages, as text."""
        return {
            name: self.read(name).decode(errors="replace").strip()
            for name, entry in self.entries.items()
            if name != PICKLE_RECORD
            and not name.startswith(storage_record(""))
            and entry.nbytes <= _MAX_NOTE_BYTES
        }

    def _read_alignment(self) -> int:
        """What records are padded to, if the file says so."""
        name = ".storage_alignment"
        if name not in self.entries or self.entries[name].nbytes > _MAX_NOTE_BYTES:
            return _ALIGNMENT_BYTES
        text = self.read(name)
        is_number = text.isdigit() and len(text) <= _MAX_ALIGNMENT_DIGITS
        return max(int(text), 1) if is_number else _ALIGNMENT_BYTES

    def _check_origin(self) -> None:
        path = self.file.path
        if "byteorder" in self.entries and self.read("byteorder") != b"little":
            text = (
                f"{path}: written on a big-endian machine, which is not supported; "
                "torch.load reads it, then save it again"
            )
            raise InvalidArgumentError(text)
        version = self.read("version").strip()
        if not version.isdigit():
            text = f"{path}: the format's version is {version[:20]!r}"
            raise CorruptCheckpointError(text, path=path)
        if len(version) > _MAX_VERSION_DIGITS or int(version) > _MAX_VERSION:
            text = f"{path}: format version {version[:20]!r} needs a newer reader"
            raise InvalidArgumentError(text)


def _read_directory(file: ReadFile) -> Directory:
    tail_bytes = min(TAIL_BYTES, file.nbytes)
    tail = read_bytes(
        file, Region("the end of the file", file.nbytes - tail_bytes, tail_bytes, None)
    )
    span = find_directory(tail, file.nbytes)
    if span is None:
        raise CorruptCheckpointError("no zip directory at the end of the file")
    return parse_directory(_directory_bytes(file, tail, span), span)


def _directory_bytes(file: ReadFile, tail: bytes, span: DirectorySpan) -> bytes:
    start = span.offset - (file.nbytes - len(tail))
    if start >= 0:
        return tail[start : start + span.nbytes]
    return read_bytes(file, Region("the zip directory", span.offset, span.nbytes, None))
