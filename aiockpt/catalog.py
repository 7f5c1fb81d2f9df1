"""Changing the tags of a root: publishing, deleting, and sweeping what died.

    ROOT/TAG/...files, ROOT/TAG/.aiockpt/manifest.json    a published tag
    ROOT/latest                                           the tag to resume from
    ROOT/.aiockpt/lock                                    held while tags change
    ROOT/.aiockpt/latest.ATTEMPT                          the next `latest`
    ROOT/.aiockpt/work/                                   see `work_area`

A tag exists if and only if its manifest can be read; the rename that publishes a
directory is the one commit point. Everything here blocks: call it in a worker.
"""

__all__ = ["Catalog"]

import contextlib
import errno
import logging
import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from importlib import metadata
from typing import NamedTuple

import torch
from typing_extensions import override

from aiockpt.adopting import adopt, adopt_late
from aiockpt.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.leases import ROOT_LOCK, Leases
from aiockpt.manifest import (
    MANIFEST_PATH,
    PRIVATE_DIR,
    FileEntry,
    Manifest,
    check_tag,
    encode,
)
from aiockpt.storage.base import Storage
from aiockpt.tag_reader import LATEST, TagReader
from aiockpt.work_area import WorkArea

_logger = logging.getLogger(__name__)

_PENDING = f"{LATEST}."


class _Pointed(NamedTuple):
    """The attempt that `latest` was moved to by this engine, and its number."""

    attempt: str
    number: int


class Catalog(TagReader):
    """The tags of one root, as one engine changes them.

    Reading needs nothing; `open_work` must come before any change.

    Attributes:
        leases: Those of readers, which keep tags from being deleted.
    """

    def __init__(self, storage: Storage) -> None:
        """Touches nothing yet."""
        super().__init__(storage)
        self.leases = Leases(storage)
        self._area = WorkArea(storage)
        self._last_ns: int | None = None
        self._pointed = _Pointed("", -1)

    # --- the engine's own work area -----------------------------------------

    def open_work(self) -> None:
        """Makes this engine's work area, and sweeps those of the dead. Idempotent.

        Raises:
            StorageError: The root cannot be made or written.
        """
        # Not every engine is started by a context manager, which sweeps, too.
        if self._area.open():
            self.sweep_if_any()

    def sweep_if_any(self) -> None:
        """Sweeps a root that can be written; else only says so."""
        try:
            self.sweep()
        except StorageError as error:
            _logger.warning("%s could not be swept: %s", self._storage.root, error)

    def close_work(self) -> None:
        """Ends this engine's leases, and removes its work area. Idempotent."""
        self.leases.release_all()
        self._area.close()

    def sweep(self) -> list[str]:
        """Removes what dead engines left; the names of these engines.

        An engine is alive while it holds its lock, however old its files are.
        """
        if not self._area.exists:
            return []
        with self._changing_tags():
            self._settle_latest()
            self.leases.sweep()
        return self._area.sweep()

    def new_directory(self) -> tuple[str, str]:
        """A fresh directory for an attempt, and the attempt's unique name."""
        return self._area.new_directory()

    def join(self, directory: str, rank: int) -> bool:
        """See `WorkArea.join`; a root that is entered first is swept."""
        is_leader = self._area.join(directory, rank)
        if is_leader:
            self.sweep_if_any()
        return is_leader

    def place(self, directory: str) -> int:
        """See `WorkArea.place`."""
        return self._area.place(directory)

    def discard(self, directory: str) -> None:
        """Removes an attempt's directory; see `WorkArea.discard`."""
        self._area.discard(directory)

    # --- publishing ----------------------------------------------------------

    def check_free(
        self, tag: str, *, is_overwrite: bool = False, is_foreign_kept: bool = False
    ) -> None:
        """Returns if `tag` can be published: nothing has that name, or may go.

        With `is_foreign_kept`, a directory that others made will not be in the way.

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
        is_directory = tag in self._storage.list_dir("")
        if not ((is_foreign_kept and is_directory) or self._storage.is_empty_dir(tag)):
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
        adopts: bool = False,
        points_latest: bool = True,
        number: int = 0,
        place: int = 0,
        hosts: Mapping[int, str] | None = None,
        before_shown: Callable[[], None] = lambda: None,
    ) -> Manifest:
        """Makes a directory of durable files the tag `tag`, and `latest`.

        The order is the promise: directories synced, manifest written and synced,
        one rename, its parent synced, then `latest` by rename, synced.

        Args:
            tag: The name to publish under.
            attempt: The attempt's unique name.
            directory: What is to be published.
            subdirectories: Its directories of files, parents first.
            files: Every file of the tag, of all places.
            world_size: Ranks that took part.
            is_overwrite: Whether it may take the place of a published tag.
            adopts: Whether files that others put into the tag's directory stay in it.
            points_latest: Whether `latest` is moved to it.
            number: Among the commits of this engine: where they run beside each other,
                `latest` does not go back to one that was begun earlier.
            place: See `Manifest`.
            hosts: See `Manifest`.
            before_shown: Called right before the rename; what it raises is raised, and
                nothing is visible.

        Raises:
            EngineStateError: Somebody else published the tag first.
            StorageError: A step failed. Before the rename nothing is visible.
        """
        storage = self._storage
        self._check_written(directory, [each for each in files if each.place == place])
        for path in reversed(subdirectories):
            storage.sync_dir(f"{directory}/{path}")
        with self._changing_tags():
            # What a dead engine published last comes before this, for good.
            self._settle_latest()
            before = self._read_pointer(LATEST)
            points_latest &= not self._is_overtaken(before, number)
            manifest = Manifest(
                tag=tag,
                attempt=attempt,
                published_ns=self._next_ns(before),
                world_size=world_size,
                files=tuple(sorted(files, key=lambda entry: entry.path)),
                place=place,
                hosts=dict(hosts or {}),
                versions=_VERSIONS,
            )
            self._write_manifest(manifest, directory)
            known = self._known(tag) if adopts else ()
            is_swap = is_overwrite and self._is_published(tag)
            if adopts and not is_swap and storage.exists(tag):
                is_swap = not storage.is_empty_dir(tag)
            if adopts and is_swap:
                adopt(storage, tag, directory, known)
            storage.sync_dir(directory)
            pending = f"{PRIVATE_DIR}/{_PENDING}{attempt}"
            if points_latest:
                storage.write_durable(pending, f"{tag}\n".encode())
            try:
                before_shown()
                self._show(tag, directory, is_swap=is_swap)
            except BaseException:
                storage.remove(pending)
                raise
            try:
                storage.sync_dir("")
                if points_latest:
                    storage.replace(pending, LATEST)
                    storage.sync_dir("")
            except BaseException:
                # Not known to be durable: hidden again before anyone is told of it.
                self._hide(tag, directory, is_swap=is_swap)
                if points_latest:
                    self._restore_latest(before, pending)
                raise
            if adopts and is_swap:
                adopt_late(storage, directory, tag, known)
            self._note_shown(manifest, number, is_latest=points_latest)
        return manifest

    def _is_overtaken(self, latest: Manifest | None, number: int) -> bool:
        is_own = latest is not None and latest.attempt == self._pointed.attempt
        return is_own and number < self._pointed.number

    def _note_shown(self, manifest: Manifest, number: int, *, is_latest: bool) -> None:
        self._last_ns = manifest.published_ns
        if is_latest:
            self._pointed = _Pointed(manifest.attempt, number)

    def _next_ns(self, latest: Manifest | None) -> int:
        """A moment after that of every tag, whatever the clock says."""
        if self._last_ns is None:
            newest = self._newest()
            self._last_ns = newest.published_ns if newest is not None else 0
        last_ns = max(self._last_ns, latest.published_ns if latest is not None else 0)
        return max(time.time_ns(), last_ns + 1)

    def _check_written(self, directory: str, entries: Sequence[FileEntry]) -> None:
        """Returns if the files are there, and whole: a manifest makes them a tag."""
        for entry in entries:
            path = f"{directory}/{entry.path}"
            if self._storage.length(path) != entry.nbytes:
                full = f"{self._storage.root}/{path}"
                raise StorageError(errno.ENOENT, "it is not there as written", full)

    def _write_manifest(self, manifest: Manifest, directory: str) -> None:
        storage = self._storage
        storage.make_dirs(f"{directory}/{PRIVATE_DIR}")
        storage.write_durable(f"{directory}/{MANIFEST_PATH}", encode(manifest))
        storage.sync_dir(f"{directory}/{PRIVATE_DIR}")

    def _known(self, tag: str) -> set[str]:
        """The files of a published tag that are aiockpt's; none if it is not one."""
        with contextlib.suppress(CheckpointNotFoundError, CorruptCheckpointError):
            return {entry.path for entry in self.manifest(tag).local_files}
        return set()

    def retract(self, manifest: Manifest, directory: str) -> None:
        """Hides what `publish` has just shown, as other places could not show it.

        Raises:
            StorageError: The file system refused; the tag may be seen here.
        """
        tag = manifest.tag
        with self._changing_tags():
            if self.manifest(tag).attempt != manifest.attempt:
                return
            latest = self._read_pointer(LATEST)
            # What stood there before is where this one was made.
            is_swap = self._storage.exists(directory)
            self._hide(tag, directory, is_swap=is_swap)
            if is_swap and directory not in self._area.in_doubt:
                # What others have put into it meanwhile, or `adopt_late` has moved.
                known = {entry.path for entry in manifest.local_files}
                adopt_late(self._storage, directory, tag, known)
            self._storage.sync_dir("")
            if latest is not None and latest.tag == tag:
                self._retreat_latest()

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
            self._area.in_doubt.add(directory)
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
        lock = self._storage.lock(ROOT_LOCK, wait=True)
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

    def expire(self, tag: str, published_ns: int) -> None:
        """As `delete`, of a tag that was published then and is not the newest.

        Raises:
            CheckpointNotFoundError: No such tag.
            EngineStateError: Somebody holds a lease on it, has replaced it, or has
                deleted all that came after it.
            StorageError: The file system refused; the tag is gone or whole.
        """
        self._delete(tag, published_ns)

    def delete(self, tag: str) -> None:
        """Unpublishes a tag, durably and at once, then removes its files.

        `latest` moves to the newest tag left where it named this one.

        Args:
            tag: Its name.

        Raises:
            CheckpointNotFoundError: No such tag.
            EngineStateError: Somebody holds a lease on it.
            StorageError: The file system refused; the tag is gone or whole.
        """
        self._delete(tag, None)

    def _delete(self, tag: str, published_ns: int | None) -> None:
        with self._changing_tags():
            if not self._is_published(check_tag(tag)):
                self.manifest(tag)
            if published_ns is not None:
                self._check_superseded(tag, published_ns)
            self.leases.check_unread(tag)
            latest = self._read_pointer(LATEST)
            # Only now: where there is no such tag, nothing may be left of the attempt.
            directory, _ = self.new_directory()
            self._storage.rename_dir(tag, directory)
            self._storage.sync_dir("")
            if latest is not None and latest.tag == tag:
                self._retreat_latest()
        self._storage.remove_tree(directory)

    def _check_superseded(self, tag: str, published_ns: int) -> None:
        if published_ns != self._published_ns(tag):
            raise EngineStateError(f"tag {tag!r} has been replaced meanwhile")
        newest = self._newest()
        if newest is not None and newest.tag == tag:
            raise EngineStateError(f"tag {tag!r} is the newest one meanwhile")

    def _published_ns(self, tag: str) -> int | None:
        """None where the manifest is damaged: such a tag can be deleted."""
        try:
            return self.manifest(tag).published_ns
        except CorruptCheckpointError:
            return None

    def _retreat_latest(self) -> None:
        newest = self._newest()
        if newest is not None:
            self._point_latest(newest.tag)
        else:
            self._storage.remove(LATEST)
            self._storage.sync_dir("")


def _own_version() -> str:
    try:
        return metadata.version("aiockpt")
    except metadata.PackageNotFoundError:
        # Imported from a source tree that was never installed.
        return "unknown"


# Looked up once: a commit reads no file that it does not need.
_VERSIONS = {"aiockpt": _own_version(), "torch": str(torch.__version__)}
