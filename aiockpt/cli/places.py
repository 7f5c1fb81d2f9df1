"""What a path on the command line stands for: a file, a tag's directory or a root."""

__all__ = [
    "Kind",
    "Place",
    "find",
    "is_plain",
    "manifest_of",
    "open_catalog",
    "opened",
    "tag_dirs",
    "verifier",
    "work_bytes",
]

import contextlib
import enum
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

from aiockpt.catalog import Catalog
from aiockpt.config import EngineConfig
from aiockpt.errors import CheckpointError, CheckpointNotFoundError
from aiockpt.loader import is_as_written
from aiockpt.machinery import Machinery
from aiockpt.manifest import MANIFEST_PATH, PRIVATE_DIR, FileEntry, Manifest
from aiockpt.storage.base import ReadFile
from aiockpt.storage.local import LocalStorage
from aiockpt.threads import WorkerPool


class Kind(enum.StrEnum):
    """The kinds of place."""

    FILE = "file"
    TAG = "tag"
    ROOT = "root"


class Place(NamedTuple):
    """Something that exists.

    Attributes:
        path: Absolute, links resolved.
        kind: What it is; a directory that is no tag counts as a root.
    """

    path: Path
    kind: Kind


def find(path: Path) -> Place:
    """The place at `path`.

    Raises:
        CheckpointNotFoundError: Nothing is there.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"there is no {str(path)!r}")
    path = path.resolve()
    if not path.is_dir():
        return Place(path, Kind.FILE)
    is_tag = (path / MANIFEST_PATH).exists()
    return Place(path, Kind.TAG if is_tag else Kind.ROOT)


def open_catalog(root: Path) -> Catalog:
    """The catalog of a root; it needs no closing.

    Raises:
        CheckpointNotFoundError: There is no such directory.
    """
    if not root.is_dir():
        raise CheckpointNotFoundError(f"there is no directory {str(root)!r}")
    return Catalog(_storage(root.resolve()))


def manifest_of(tag_dir: Path) -> Manifest:
    """The manifest of a tag's directory.

    Raises:
        CorruptCheckpointError: It is not as it was written, or is another tag's.
    """
    return open_catalog(tag_dir.parent).manifest(tag_dir.name)


def tag_dirs(root: Path) -> list[Path]:
    """Directories of all published tags, broken ones included, in order of name.

    A link to one is none, as for the engine.
    """
    found = [path.parent.parent for path in sorted(root.glob(f"*/{MANIFEST_PATH}"))]
    return [path for path in found if not path.is_symlink()]


def work_bytes(root: Path) -> dict[str, int]:
    """Bytes of the unpublished files of each engine that has worked in the root."""
    engines = (root / PRIVATE_DIR / "work").glob("*/")
    return {engine.name: _tree_bytes(engine) for engine in engines}


def _tree_bytes(directory: Path) -> int:
    """Bytes of the files in it, which others may remove meanwhile."""
    nbytes = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                nbytes += Path(parent, name).lstat().st_size
    return nbytes


@contextlib.contextmanager
def opened(directory: Path, path: str) -> Generator[ReadFile]:
    """Opens `path` below `directory`, following no links below it."""
    with contextlib.closing(_storage(directory).open_read(path)) as file:
        yield file


def is_plain(tag_dir: Path, entry: FileEntry) -> bool:
    """Whether a file that is no checkpoint has the bytes that were saved all the same."""
    try:
        with opened(tag_dir, entry.path) as file:
            return is_as_written(file, entry.crc32)
    except CheckpointError:
        return False


@contextlib.contextmanager
def verifier(
    advance: Callable[[int], None],
) -> Generator[Callable[[ReadFile], int]]:
    """What checks an open file with all cores, closes it, and returns its CRC-32.

    Args:
        advance: Told the number of further bytes read, by any thread.
    """
    machinery = Machinery(EngineConfig(host_cache_size=0.125))
    try:
        yield lambda file: machinery.spawn(
            machinery.loader.verify(lambda: (file, None), advance)
        ).result()
    finally:
        machinery.stop()
        machinery.join()


def _storage(directory: Path) -> LocalStorage:
    # Reading starts no worker, so there is none to end.
    return LocalStorage(str(directory), WorkerPool(1, "aiockpt-cli"))
