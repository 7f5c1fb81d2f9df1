"""Changing the tags of a root: publishing, deleting, and sweeping what died.

    ROOT/TAG/...files, ROOT/TAG/.aiockpt/manifest.json    a published tag
    ROOT/latest                                           the tag to resume from
    ROOT/.aiockpt/lock                                    held while tags change
    ROOT/.aiockpt/latest.ATTEMPT                          the next `latest`
    ROOT/.aiockpt/work/ENGINE/N/...files                  an attempt, or trash
    ROOT/.aiockpt/work/ENGINE.lock                        held while ENGINE lives

A tag exists if and only if its manifest can be read; the rename that publishes a
directory is the one commit point. Everything here blocks: call it in a worker.
"""

__all__ = ["Catalog"]

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Generator, Sequence
from importlib import metadata

import torch
from typing_extensions import override

from aiockpt.errors import (
    EngineStateError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.manifest import (
    MANIFEST_PATH,
    PRIVATE_DIR,
    FileEntry,
    Manifest,
    check_tag,
    encode,
)
from aiockpt.storage.base import Lock, Storage
from aiockpt.tag_reader import LATEST, TagReader

_logger = logging.getLogger(__name__)

_WORK_DIR = f"{PRIVATE_DIR}/work"
_ROOT_LOCK = f"{PRIVATE_DIR}/lock"
_PENDING = f"{LATEST}."


class Catalog(TagReader):
    """The tags of one root, as one engine changes them.

    Reading needs nothing; `open_work` must come before any change.
    """

    def __init__(self, storage: Storage) -> None:
        """Touches nothing yet."""
        super().__init__(storage)
        self._engine = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}"
        self._lock: Lock | None = None
        self._num_made = 0
        self._in_doubt: set[str] = set()

    # --- the engine's own work area -----------------------------------------

    def open_work(self) -> None:
        """Makes this engine's work area, and sweeps those of the dead. Idempotent.

        Raises:
            StorageError: The root cannot be made or written.
        """
        if self._lock is not None:
            return
        made = self._storage.make_dirs(_WORK_DIR)
        for path in reversed(made):
            self._storage.sync_dir(path.rpartition("/")[0])
        # Locked before the directory exists: a directory without a held lock is dead.
        self._lock = self._storage.lock(f"{_WORK_DIR}/{self._engine}.lock", wait=True)
        self._storage.make_dirs(f"{_WORK_DIR}/{self._engine}")
        # Not every engine is started by a context manager, which sweeps, too.
        self.sweep_if_any()

    def sweep_if_any(self) -> None:
        """Sweeps a root that can be written; else only says so."""
        try:
            self.sweep()
        except StorageError as error:
            _logger.warning("%s could not be swept: %s", self._storage.root, error)

    def close_work(self) -> None:
        """Removes this engine's work area and lets go of its lock. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            if not self._in_doubt:
                self._storage.remove_tree(f"{_WORK_DIR}/{self._engine}")
                self._storage.remove(f"{_WORK_DIR}/{self._engine}.lock")
        finally:
            lock.release()

    def sweep(self) -> list[str]:
        """Removes what dead engines left; the names of these engines.

        An engine is alive while it holds its lock, however old its files are.
        """
        if not self._storage.exists(_WORK_DIR):
            return []
        with self._changing_tags():
            self._settle_latest()
        dead: list[str] = []
        for engine in sorted(self._engines() - {self._engine}):
            lock_path = f"{_WORK_DIR}/{engine}.lock"
            lock = self._storage.lock(lock_path, wait=False)
            if lock is None:
                continue
            try:
                self._storage.remove_tree(f"{_WORK_DIR}/{engine}")
                self._storage.remove(lock_path)
            finally:
                lock.release()
            dead.append(engine)
            _logger.info("removed what the dead engine %s left behind", engine)
        return dead

    def _engines(self) -> set[str]:
        """The engines that have left a directory or a lock, dead or alive."""
        names = self._storage.list_files(_WORK_DIR)
        locks = {name.removesuffix(".lock") for name in names if name.endswith(".lock")}
        return locks.union(self._storage.list_dir(_WORK_DIR))

    def new_directory(self) -> tuple[str, str]:
        """A fresh directory for an attempt, and the attempt's unique name."""
        self._num_made += 1
        directory = f"{_WORK_DIR}/{self._engine}/{self._num_made}"
        self._storage.make_dirs(directory)
        return directory, f"{self._engine}.{self._num_made}"

    def discard(self, directory: str) -> None:
        """Removes an attempt's directory with all that is in it.

        Not one that may hold the only durable copy of a tag: that is left to the
        sweep of a later process, when it has shown which copy is the tag.
        """
        if directory not in self._in_doubt:
            self._storage.remove_tree(directory)

    # --- publishing ----------------------------------------------------------

    def check_free(self, tag: str, *, is_overwrite: bool = False) -> None:
        """Returns if `tag` can be published: nothing has that name, or may go.

        Raises:
            EngineStateError: The tag is published, and not to be overwritten.
            InvalidArgumentError: A foreign file or directory has that name.
        """
        if not self._storage.exists(tag):
            return
        if self._is_published(tag):
            if is_overwrite:
                return
            raise EngineStateError(
                f"tag {tag!r} is published already (overwrite=True replaces it)"
            )
        if not self._storage.is_empty_dir(tag):
            full = f"{self._storage.root}/{tag}"
            message = f"{full!r} exists and is not a tag: choose another, or move it"
            raise InvalidArgumentError(message)

    def publish(  # noqa: PLR0913 - the parts of a manifest
        self,
        tag: str,
        attempt: str,
        directory: str,
        *,
        subdirectories: Sequence[str],
        files: Sequence[FileEntry],
        world_size: int,
        is_overwrite: bool,
    ) -> Manifest:
        """Makes a directory of durable files the tag `tag`, and `latest`.

        The order is the promise: directories synced, manifest written and synced,
        one rename, its parent synced, then `latest` by rename, synced.

        Raises:
            EngineStateError: Somebody else published the tag first.
            StorageError: A step failed. Before the rename nothing is visible.
        """
        storage = self._storage
        for path in reversed(subdirectories):
            storage.sync_dir(f"{directory}/{path}")
        with self._changing_tags():
            # What a dead engine published last comes before this, for good.
            self._settle_latest()
            before = self._read_pointer(LATEST)
            manifest = Manifest(
                tag=tag,
                attempt=attempt,
                published_ns=_next_ns(before.published_ns if before else 0),
                world_size=world_size,
                files=tuple(sorted(files, key=lambda entry: entry.path)),
                versions=_VERSIONS,
            )
            storage.make_dirs(f"{directory}/{PRIVATE_DIR}")
            storage.write_durable(f"{directory}/{MANIFEST_PATH}", encode(manifest))
            storage.sync_dir(f"{directory}/{PRIVATE_DIR}")
            storage.sync_dir(directory)
            pending = f"{PRIVATE_DIR}/{_PENDING}{attempt}"
            storage.write_durable(pending, f"{tag}\n".encode())
            is_swap = is_overwrite and self._is_published(tag)
            try:
                self._show(tag, directory, is_swap=is_swap)
            except BaseException:
                storage.remove(pending)
                raise
            try:
                storage.sync_dir("")
                storage.replace(pending, LATEST)
                storage.sync_dir("")
            except BaseException:
                # Not known to be durable: hidden again before anyone is told of it.
                self._hide(tag, directory, is_swap=is_swap)
                self._restore_latest(before, pending)
                raise
        return manifest

    def _show(self, tag: str, directory: str, *, is_swap: bool) -> None:
        if is_swap:
            # The old tag goes where the new one was made, and away with it.
            self._storage.exchange(directory, tag)
            return
        self.check_free(tag)
        self._storage.rename_dir(directory, tag)

    def _hide(self, tag: str, directory: str, *, is_swap: bool) -> None:
        try:
            if is_swap:
                self._storage.exchange(directory, tag)
            else:
                self._storage.rename_dir(tag, directory)
        except StorageError:
            self._in_doubt.add(directory)
            _logger.exception("the failed commit of tag %s could not be undone", tag)

    def _restore_latest(self, before: Manifest | None, pending: str) -> None:
        try:
            if self._storage.exists(pending):
                self._storage.remove(pending)
            elif before is None:
                self._storage.remove(LATEST)
            else:
                self._point_latest(before.tag)
        except StorageError:
            _logger.exception("`latest` could not be set back")

    @contextlib.contextmanager
    def _changing_tags(self) -> Generator[None]:
        lock = self._storage.lock(_ROOT_LOCK, wait=True)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    # --- the latest ----------------------------------------------------------

    @override
    def _latest(self) -> Manifest | None:
        manifest = self._read_pointer(LATEST)
        if manifest is not None or (newest := self._newest()) is None:
            return manifest
        try:
            with self._changing_tags():
                # Somebody may have repaired it, published or deleted meanwhile.
                manifest = self._read_pointer(LATEST)
                if manifest is None and (newest := self._newest()) is not None:
                    self._point_latest(newest.tag)
        except StorageError as error:
            _logger.warning("`latest` could not be repaired: %s", error)
        if manifest is None and newest is not None:
            message = "%s/latest names no tag; by the manifests it is %s"
            _logger.warning(message, self._storage.root, newest.tag)
        return manifest or newest

    def _point_latest(self, tag: str) -> None:
        pending = f"{PRIVATE_DIR}/{_PENDING}{secrets.token_hex(8)}"
        self._storage.write_durable(pending, f"{tag}\n".encode())
        try:
            self._storage.replace(pending, LATEST)
        except BaseException:
            self._storage.remove(pending)
            raise
        self._storage.sync_dir("")

    def _settle_latest(self) -> None:
        """Finishes, or drops, pointer changes that a crash left half done."""
        storage = self._storage
        for name in storage.list_files(PRIVATE_DIR):
            if not name.startswith(_PENDING):
                continue
            pending = f"{PRIVATE_DIR}/{name}"
            if self._is_ahead(self._read_pointer(pending), name):
                storage.replace(pending, LATEST)
                storage.sync_dir("")
            else:
                storage.remove(pending)

    def _is_ahead(self, manifest: Manifest | None, name: str) -> bool:
        """Whether a pending pointer names a tag published after that of `latest`.

        After a power cut btrfs may show a pointer that was moved, and synced, under
        its old name as well: a second name of what is `latest`, or of what was.
        """
        if manifest is None or manifest.attempt != name.removeprefix(_PENDING):
            return False
        current = self._read_pointer(LATEST)
        return current is None or current.published_ns < manifest.published_ns

    # --- deleting ------------------------------------------------------------

    def delete(self, tag: str) -> None:
        """Unpublishes a tag, durably and at once, then removes its files.

        `latest` moves to the newest tag left where it named this one.

        Raises:
            CheckpointNotFoundError: No such tag.
            StorageError: The file system refused; the tag is gone or whole.
        """
        with self._changing_tags():
            if not self._is_published(check_tag(tag)):
                self.manifest(tag)
            latest = self._read_pointer(LATEST)
            # Only now: where there is no such tag, nothing may be left of the attempt.
            directory, _ = self.new_directory()
            self._storage.rename_dir(tag, directory)
            self._storage.sync_dir("")
            if latest is not None and latest.tag == tag:
                self._retreat_latest()
        self._storage.remove_tree(directory)

    def _retreat_latest(self) -> None:
        newest = self._newest()
        if newest is not None:
            self._point_latest(newest.tag)
        else:
            self._storage.remove(LATEST)
            self._storage.sync_dir("")


def _next_ns(last_ns: int) -> int:
    return max(time.time_ns(), last_ns + 1)


def _own_version() -> str:
    try:
        return metadata.version("aiockpt")
    except metadata.PackageNotFoundError:
        # Imported from a source tree that was never installed.
        return "unknown"


# Looked up once: a commit reads no file that it does not need.
_VERSIONS = {"aiockpt": _own_version(), "torch": str(torch.__version__)}
