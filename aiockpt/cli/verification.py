"""Whether every byte of a file, a tag or a root is what was written."""

__all__ = ["Fault", "Verification", "num_bytes", "verify"]

from collections.abc import Callable
from pathlib import Path

import msgspec

from aiockpt.cli.places import (
    Kind,
    Place,
    is_plain,
    manifest_of,
    opened,
    tag_dirs,
    verifier,
)
from aiockpt.errors import CheckpointError, CheckpointNotFoundError
from aiockpt.manifest import FileEntry, Manifest
from aiockpt.storage.base import ReadFile

Progress = Callable[[int], None]
Check = Callable[[ReadFile], int]


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong.

    Attributes:
        path: The file (or the tag's directory) at fault.
        message: What is wrong with it; names the file.
        key: The tensor at fault, where it is known.
        offset: The first wrong region's offset in the file, where it is known.
    """

    path: str
    message: str
    key: str | None = None
    offset: int | None = None


class Verification(msgspec.Struct, kw_only=True):
    """What was checked and what was found.

    Attributes:
        path: What was verified.
        tags: Tags of which every file was checked.
        num_files: Files checked.
        nbytes: Bytes read.
        faults: Everything wrong; empty if all is well.
    """

    path: str
    tags: list[str] = []
    num_files: int = 0
    nbytes: int = 0
    faults: list[Fault] = []


def num_bytes(place: Place) -> int:
    """Bytes that `verify` will read, as far as can be told beforehand."""
    match place.kind:
        case Kind.FILE:
            return place.path.stat().st_size
        case Kind.TAG:
            return _tag_bytes(place.path)
        case Kind.ROOT:
            return sum(map(_tag_bytes, tag_dirs(place.path)))


def verify(place: Place, advance: Progress) -> Verification:
    """Reads everything and compares it with its checksums; goes on after a fault.

    Args:
        place: A file, a tag's directory or a root.
        advance: Told the number of further bytes read, now and then.

    Raises:
        CheckpointNotFoundError: The root has no tags: nothing would be verified.
    """
    found = Verification(path=str(place.path))
    with verifier(advance) as check:
        match place.kind:
            case Kind.FILE:
                _check_file(found, place.path.parent, place.path.name, None, check)
            case Kind.TAG:
                _check_tag(found, place.path, check)
            case Kind.ROOT:
                dirs = tag_dirs(place.path)
                if not dirs:
                    message = f"{str(place.path)!r} holds no published tag"
                    raise CheckpointNotFoundError(message)
                for tag_dir in dirs:
                    _check_tag(found, tag_dir, check)
    return found


def _tag_bytes(tag_dir: Path) -> int:
    try:
        return manifest_of(tag_dir).nbytes
    except CheckpointError:
        return 0


def _check_tag(found: Verification, tag_dir: Path, check: Check) -> None:
    try:
        manifest = manifest_of(tag_dir)
    except CheckpointError as error:
        # One that was there when tags were listed may be gone.
        if tag_dir.exists():
            found.faults.append(_fault(tag_dir, error))
        return
    num_before = len(found.faults)
    for entry in manifest.local_files:
        _check_file(found, tag_dir, entry.path, entry, check)
    if len(found.faults) > num_before and not _is_still(manifest, tag_dir):
        # Somebody has deleted or replaced it: that is no damage.
        del found.faults[num_before:]
        _check_tag(found, tag_dir, check)
        return
    found.tags.append(manifest.tag)


def _is_still(manifest: Manifest, tag_dir: Path) -> bool:
    try:
        return manifest_of(tag_dir).attempt == manifest.attempt
    except CheckpointError:
        return tag_dir.exists()


def _check_file(
    found: Verification,
    directory: Path,
    path: str,
    entry: FileEntry | None,
    check: Check,
) -> None:
    full = directory / path
    found.num_files += 1
    try:
        with opened(directory, path) as file:
            found.nbytes += file.nbytes
            difference = _compare(file, entry, check)
    except CheckpointError as error:
        if entry is None or not is_plain(directory, entry):
            found.faults.append(_fault(full, error))
        return
    if difference is not None:
        found.faults.append(Fault(path=str(full), message=f"{full}: {difference}"))


def _compare(file: ReadFile, entry: FileEntry | None, check: Check) -> str | None:
    """How a file that is sound in itself differs from the manifest, if it does."""
    if entry is not None and file.nbytes != entry.nbytes:
        return f"{file.nbytes} bytes, but {entry.nbytes} were written"
    crc32 = check(file)
    if entry is not None and crc32 != entry.crc32:
        return f"CRC-32 {crc32:08x}, but {entry.crc32:08x} was written"
    return None


def _fault(path: Path, error: CheckpointError) -> Fault:
    key: str | None = getattr(error, "key", None)
    offset: int | None = getattr(error, "offset", None)
    message = str(error)
    if key is not None and key not in message:
        message = f"{message} (tensor {key!r})"
    if str(path) not in message:
        message = f"{path}: {message}"
    return Fault(path=str(path), message=message, key=key, offset=offset)
