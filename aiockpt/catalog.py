"""The tags of a root: publishing, finding, deleting them, and sweeping what died.

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

from aiockpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.manifest import (
    MANIFEST_PATH,
    PRIVATE_DIR,
    FileEntry,
    Manifest,
    TagInfo,
    check_path,
    check_tag,
    decode,
    encode,
)
from aiockpt.storage.base import Lock, ReadFile, Storage

_logger = logging.getLogger(__name__)

_WORK_DIR = f"{PRIVATE_DIR}/work"
_ROOT_LOCK = f"{PRIVATE_DIR}/lock"
_LATEST = "latest"
_PENDING = "latest."
# A manifest takes about 100 bytes a file; a tag name less than 256.
_MAX_MANIFEST_BYTES = 1 << 30
_MAX_LATEST_BYTES = 4096


class Catalog:
    """The tags of one root, as one engine sees and changes them.

    Reading needs nothing; `open_work` must come before any change.
    """

    def __init__(self, storage: Storage) -> None:
        """Touches nothing yet."""
        self._storage = storage
        self._engine = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}"
        self._lock: Lock | None = None
        self._num_made = 0

    # --- the engine's own work area -----------------------------------------

    def open_work(self) -> None:
        """Makes this engine's work area. Idempotent.

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

    def sweep_if_any(self) -> None:
        """Sweeps a root that was used before and can be written; else does nothing."""
        if not self._storage.exists(_WORK_DIR):
            return
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
            self._storage.remove_tree(f"{_WORK_DIR}/{self._engine}")
            self._storage.remove(f"{_WORK_DIR}/{self._engine}.lock")
        finally:
            lock.release()

    def abandon_work(self) -> None:
        """In a forked child: forgets the lock, which is the parent's."""
        self._lock = None

    def sweep(self) -> list[str]:
        """Removes what dead engines left; the names of these engines.

        An engine is alive while it holds its lock, however old its files are.
        """
        with self._changing_tags():
            self._settle_latest()
        dead: list[str] = []
        for engine in self._storage.list_dir(_WORK_DIR):
            if engine == self._engine:
                continue
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

    def new_directory(self) -> tuple[str, str]:
        """A fresh directory for an attempt, and the attempt's unique name."""
        self._num_made += 1
        directory = f"{_WORK_DIR}/{self._engine}/{self._num_made}"
        self._storage.make_dirs(directory)
        return directory, f"{self._engine}.{self._num_made}"

    def discard(self, directory: str) -> None:
        """Removes an attempt's directory with all that is in it."""
        self._storage.remove_tree(directory)

    # --- publishing ----------------------------------------------------------

    def check_free(self, tag: str) -> None:
        """Returns if nothing is published under `tag`.

        Raises:
            EngineStateError: The tag is published.
            InvalidArgumentError: A foreign file or directory has that name.
        """
        if not self._storage.exists(tag):
            return
        if self._is_published(tag):
            raise EngineStateError(
                f"tag {tag!r} is published already (overwrite=True replaces it)"
            )
        if not self._storage.is_empty_dir(tag):
            full = f"{self._storage.root}/{tag}"
            message = f"{full!r} exists and is not a tag: choose another, or move it"
            raise InvalidArgumentError(message)

    def _is_published(self, tag: str) -> bool:
        return self._storage.exists(f"{tag}/{MANIFEST_PATH}")

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
            manifest = Manifest(
                tag=tag,
                attempt=attempt,
                published_ns=self._next_published_ns(),
                world_size=world_size,
                files=tuple(sorted(files, key=lambda entry: entry.path)),
                versions=_versions(),
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
                storage.replace(pending, _LATEST)
                storage.sync_dir("")
            except BaseException:
                # Not known to be durable: hidden again before anyone is told of it.
                self._hide(tag, directory, is_swap=is_swap)
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
            _logger.exception("the failed commit of tag %s could not be undone", tag)

    def _next_published_ns(self) -> int:
        last = self._read_latest()
        last_ns = self.manifest(last).published_ns if last is not None else 0
        return max(time.time_ns(), last_ns + 1)

    @contextlib.contextmanager
    def _changing_tags(self) -> Generator[None]:
        lock = self._storage.lock(_ROOT_LOCK, wait=True)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    # --- finding -------------------------------------------------------------

    def manifest(self, tag: str) -> Manifest:
        """The manifest of a published tag.

        Raises:
            CheckpointNotFoundError: No such tag; the message lists those there are.
            CorruptCheckpointError: There is one, and it is not as it was written.
        """
        path = f"{check_tag(tag)}/{MANIFEST_PATH}"
        try:
            data = self._storage.read_bytes(path, _MAX_MANIFEST_BYTES)
        except CheckpointNotFoundError as error:
            known = ", ".join(info.tag for info in self.tags()) or "none"
            message = f"no tag {tag!r} in {self._storage.root!r}; published: {known}"
            raise CheckpointNotFoundError(message) from error
        manifest = decode(data, f"{self._storage.root}/{path}")
        if manifest.tag != tag:
            message = f"{path}: the manifest is of tag {manifest.tag!r}"
            raise CorruptCheckpointError(message, path=path)
        return manifest

    def tags(self) -> list[TagInfo]:
        """Every published tag, oldest first. A broken one is logged and left out."""
        found: list[TagInfo] = []
        for name in self._storage.list_dir(""):
            try:
                if name.startswith(".") or not self._is_published(check_tag(name)):
                    continue
                found.append(TagInfo.of(self.manifest(name)))
            except (InvalidArgumentError, CheckpointNotFoundError):
                # A foreign directory, or a tag deleted while we looked.
                continue
            except (CorruptCheckpointError, StorageError) as error:
                _logger.warning("tag %s is left out: %s", name, error)
        return sorted(found, key=lambda info: info.published_ns)

    def latest(self) -> str | None:
        """The tag to resume from; None where nothing is published.

        A pointer that is missing, torn or dangling is repaired from the manifests.
        """
        tag = self._read_latest()
        if tag is not None:
            return tag
        tags = self.tags()
        if not tags:
            return None
        _logger.warning(
            "%s/latest names no tag; repaired from the manifests to %s",
            self._storage.root,
            tags[-1].tag,
        )
        try:
            with self._changing_tags():
                # Somebody may have repaired it, or published, since we looked.
                tag = self._read_latest()
                if tag is None:
                    tag = tags[-1].tag
                    self._point_latest(tag)
        except StorageError as error:
            _logger.warning("`latest` could not be repaired: %s", error)
            tag = tags[-1].tag
        return tag

    def open_file(self, path: str | os.PathLike[str], tag: str | None) -> ReadFile:
        """Opens a file of a published tag (by default the latest) for reading.

        An absolute path inside a tag's directory names the tag by itself.

        Raises:
            CheckpointNotFoundError: No such tag or file; the message lists what is.
            CorruptCheckpointError: Its length is not that of the manifest.
        """
        root = self._storage.root
        text = os.fspath(path)
        if tag is None and text.startswith(f"{root}/"):
            tag, _, text = text.removeprefix(f"{root}/").partition("/")
        tag = tag if tag is not None else self.latest()
        if tag is None:
            raise CheckpointNotFoundError(f"nothing is published in {root!r}")
        manifest = self.manifest(tag)
        relative = check_path(text, [f"{root}/{tag}"])
        entries = {entry.path: entry for entry in manifest.files}
        if relative not in entries:
            known = ", ".join(map(repr, entries))
            message = f"tag {tag!r} has no file {relative!r}; it has {known}"
            raise CheckpointNotFoundError(message)
        file = self._storage.open_read(f"{tag}/{relative}")
        if file.nbytes != entries[relative].nbytes:
            expected = entries[relative].nbytes
            file.close()
            message = f"{file.path}: {file.nbytes} bytes, not {expected} as written"
            raise CorruptCheckpointError(
                message, path=file.path, offset=min(file.nbytes, expected)
            )
        return file

    def _read_latest(self) -> str | None:
        try:
            data = self._storage.read_bytes(_LATEST, _MAX_LATEST_BYTES)
            return self.manifest(check_tag(data.decode().strip())).tag
        except (CheckpointError, UnicodeDecodeError):
            return None

    def _point_latest(self, tag: str) -> None:
        pending = f"{PRIVATE_DIR}/{_PENDING}{secrets.token_hex(8)}"
        self._storage.write_durable(pending, f"{tag}\n".encode())
        self._storage.replace(pending, _LATEST)
        self._storage.sync_dir("")

    def _settle_latest(self) -> None:
        """Finishes, or drops, pointer changes that a crash left half done."""
        storage = self._storage
        for name in storage.list_files(PRIVATE_DIR):
            if not name.startswith(_PENDING):
                continue
            pending = f"{PRIVATE_DIR}/{name}"
            attempt = name.removeprefix(_PENDING)
            if self._is_of_attempt(pending, attempt):
                storage.replace(pending, _LATEST)
                storage.sync_dir("")
            else:
                storage.remove(pending)

    def _is_of_attempt(self, pending: str, attempt: str) -> bool:
        """Whether the tag that a pending pointer names was published by `attempt`."""
        try:
            tag = self._storage.read_bytes(pending, _MAX_LATEST_BYTES).decode().strip()
            return self.manifest(tag).attempt == attempt
        except (CheckpointError, UnicodeDecodeError):
            return False

    # --- deleting ------------------------------------------------------------

    def delete(self, tag: str) -> None:
        """Unpublishes a tag, durably and at once, then removes its files.

        `latest` moves to the newest tag left where it named this one.

        Raises:
            CheckpointNotFoundError: No such tag.
            StorageError: The file system refused; the tag is gone or whole.
        """
        directory, _ = self.new_directory()
        with self._changing_tags():
            if not self._is_published(check_tag(tag)):
                self.manifest(tag)
            was_latest = self._read_latest() == tag
            self._storage.rename_dir(tag, directory)
            self._storage.sync_dir("")
            if was_latest:
                self._retreat_latest()
        self._storage.remove_tree(directory)

    def _retreat_latest(self) -> None:
        tags = self.tags()
        if tags:
            self._point_latest(tags[-1].tag)
        else:
            self._storage.remove(_LATEST)
            self._storage.sync_dir("")


def _versions() -> dict[str, str]:
    return {"aiockpt": metadata.version("aiockpt"), "torch": str(torch.__version__)}
