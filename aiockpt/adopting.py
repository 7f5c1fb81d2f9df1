"""Keeping what others put into a tag's directory when the tag is published.

Trainers and people put files of their own beside a checkpoint: scripts, notes, copies
of offloaded tensors. Publishing puts another directory in the place of that one. So
the files are linked into the new directory first: wherever that is interrupted, they
are where they were. Everything here blocks: call it in a worker.
"""

__all__ = ["adopt", "adopt_late"]

import contextlib
import logging
from collections.abc import Collection, Iterator

from aiockpt.errors import CheckpointNotFoundError, StorageError
from aiockpt.manifest import PRIVATE_DIR
from aiockpt.storage.base import Storage

_logger = logging.getLogger(__name__)


def adopt(storage: Storage, source: str, target: str, known: Collection[str]) -> None:
    """Gives all files of `source` but `known` a second name in `target`.

    Args:
        storage: Where both directories are.
        source: The directory as others know it.
        target: The directory that is to be shown in its place.
        known: Paths, relative to `source`, that are not adopted: aiockpt's own files.

    Raises:
        StorageError: The file system refused. Nothing of `source` has changed.
    """
    touched: set[str] = set()
    for path in _files(storage, source, known):
        parent = path.rpartition("/")[0]
        if parent:
            storage.make_dirs(f"{target}/{parent}")
        if not storage.exists(f"{target}/{path}"):
            storage.link(f"{source}/{path}", f"{target}/{path}")
            touched.update(_ancestors(path))
    # What is inside first; the target itself is synced by who shows it.
    for directory in sorted(touched, key=len, reverse=True):
        storage.sync_dir(f"{target}/{directory}")


def _ancestors(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def adopt_late(
    storage: Storage, source: str, target: str, known: Collection[str]
) -> None:
    """Moves what came into `source` between `adopt` and the exchange to `target`.

    Args:
        storage: Where both directories are.
        source: The directory that was exchanged.
        target: The directory that others see now: it is published, and stays so
            whatever is refused here.
        known: As for `adopt`.
    """
    try:
        for path in _files(storage, source, known):
            _move(storage, f"{source}/{path}", f"{target}/{path}")
    except StorageError as error:
        _logger.warning("files that others have just put there are lost: %s", error)


def _move(storage: Storage, source: str, target: str) -> None:
    # What vanishes meanwhile, or cannot be moved, was not ours to keep.
    with contextlib.suppress(StorageError, CheckpointNotFoundError):
        if not storage.exists(target):
            storage.make_dirs(target.rpartition("/")[0])
            storage.replace(source, target)


def _files(
    storage: Storage, directory: str, known: Collection[str], inside: str = ""
) -> Iterator[str]:
    base = f"{directory}/{inside}".rstrip("/")
    for name in storage.list_files(base):
        path = f"{inside}{name}"
        if path not in known:
            yield path
    for name in storage.list_dir(base):
        if inside or name != PRIVATE_DIR:
            yield from _files(storage, directory, known, f"{inside}{name}/")
