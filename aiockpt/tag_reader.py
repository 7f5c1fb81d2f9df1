"""Reading the tags of a root: which there are, which is the latest, their files.

A tag exists if and only if its manifest can be read. Nothing here changes a file,
so it needs no lock: what others change meanwhile is looked at again. Everything
blocks: call it in a worker.
"""

__all__ = ["LATEST", "TagReader", "is_about_content"]

import contextlib
import errno
import logging
import os
from collections.abc import Sequence
from typing import Final

from aiockpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InvalidArgumentError,
    StorageError,
)
from aiockpt.manifest import (
    MANIFEST_PATH,
    FileEntry,
    Manifest,
    TagInfo,
    check_path,
    check_tag,
    decode,
)
from aiockpt.storage.base import ReadFile, Storage

_logger = logging.getLogger(__name__)

# The pointer file: the tag to resume from, as text.
LATEST: Final = "latest"

# A manifest takes about 100 bytes a file; a tag name less than 256.
_MAX_MANIFEST_BYTES = 1 << 30
_MAX_LATEST_BYTES = 4096
# Each retry needs one more overwrite to come in between.
_MAX_RETRIES = 100
# A link, a directory, a device or a huge file where a small file should be.
_WRONG_KIND = {errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.ENXIO, errno.EFBIG}


class TagReader:
    """The published tags of one root."""

    def __init__(self, storage: Storage) -> None:
        """Touches nothing yet."""
        self._storage = storage

    def manifest(self, tag: str) -> Manifest:
        """The manifest of a published tag.

        Raises:
            CheckpointNotFoundError: No such tag; the message lists those there are.
            CorruptCheckpointError: There is one, and it is not as it was written.
        """
        path = f"{check_tag(tag)}/{MANIFEST_PATH}"
        try:
            data = self._read_manifest(tag, path)
        except CheckpointNotFoundError as error:
            known = ", ".join(info.tag for info in self.tags()) or "none"
            message = f"no tag {tag!r} in {self._storage.root!r}; published: {known}"
            raise CheckpointNotFoundError(message) from error
        manifest = decode(data, f"{self._storage.root}/{path}")
        if manifest.tag != tag:
            message = f"{path}: the manifest is of tag {manifest.tag!r}"
            raise CorruptCheckpointError(message, path=path)
        return manifest

    def _read_manifest(self, tag: str, path: str) -> bytes:
        for _ in range(_MAX_RETRIES):
            try:
                return self._storage.read_bytes(path, _MAX_MANIFEST_BYTES)
            except CheckpointNotFoundError:
                if not self._is_published(tag):
                    raise
                # Overwritten, and the old one removed, on the way to the file.
        return self._storage.read_bytes(path, _MAX_MANIFEST_BYTES)

    def _is_published(self, tag: str) -> bool:
        return self._storage.exists(f"{tag}/{MANIFEST_PATH}")

    def tags(self) -> list[TagInfo]:
        """Every published tag, oldest first. A broken one is logged and left out."""
        return [TagInfo.of(manifest) for manifest in self._manifests(is_tolerant=True)]

    def _manifests(self, *, is_tolerant: bool) -> list[Manifest]:
        """The manifests of all tags, oldest first; broken ones are left out.

        Raises:
            StorageError: The file system refused to show one; with `is_tolerant`,
                that one is left out, too.
        """
        found: list[Manifest] = []
        for name in self._storage.list_dir(""):
            try:
                if name.startswith(".") or not self._is_published(check_tag(name)):
                    continue
                found.append(self.manifest(name))
            except (InvalidArgumentError, CheckpointNotFoundError):
                # A foreign directory, or a tag deleted while we looked.
                continue
            except (CorruptCheckpointError, StorageError) as error:
                if not (is_tolerant or is_about_content(error)):
                    raise
                _logger.warning("tag %s is left out: %s", name, error)
        return sorted(found, key=lambda manifest: manifest.published_ns)

    def latest(self) -> str | None:
        """The tag to resume from; None where nothing is published.

        A pointer that is missing, torn or dangling is repaired from the manifests.

        Raises:
            StorageError: The file system refused to show the pointer or a manifest.
                Because of that, an older tag must not be taken for the latest.
        """
        manifest = self._latest()
        return manifest.tag if manifest is not None else None

    def latest_commit(self) -> Manifest | None:
        """As `latest`, with the attempt that it was published by."""
        return self._latest()

    def latest_first(self) -> list[Manifest]:
        """The tag to resume from, then those published before it, newest first.

        Raises:
            StorageError: The file system refused to show the pointer or a manifest.
        """
        latest = self._latest()
        if latest is None:
            return []
        older = [
            manifest
            for manifest in reversed(self._manifests(is_tolerant=False))
            if manifest.published_ns < latest.published_ns
        ]
        return [latest, *older]

    def _latest(self) -> Manifest | None:
        return self._read_pointer(LATEST) or self._newest()

    def _newest(self) -> Manifest | None:
        """The tag that was published last, by the manifests."""
        manifests = self._manifests(is_tolerant=False)
        return manifests[-1] if manifests else None

    def _read_pointer(self, path: str) -> Manifest | None:
        """The tag that a pointer file names; None unless that is a published one.

        Raises:
            StorageError: The file system refused to say.
        """
        try:
            data = self._storage.read_bytes(path, _MAX_LATEST_BYTES)
            return self.manifest(check_tag(data.decode().strip()))
        except UnicodeDecodeError:
            return None
        except CheckpointError as error:
            if not is_about_content(error):
                raise
            return None

    def open_file(
        self,
        path: str | os.PathLike[str],
        tag: str | None,
        attempt: str | None = None,
    ) -> tuple[ReadFile, FileEntry]:
        """Opens a file of a published tag (by default the latest) for reading.

        Where an `attempt` is given, the tag must have been published by that.

        Returns:
            The file, and what the manifest says of it.

        An absolute path inside a tag's directory names the tag by itself.

        Raises:
            CheckpointNotFoundError: No such tag or file; the message lists what is.
            CorruptCheckpointError: Its length is not that of the manifest.
        """
        root = self._storage.root
        text: object = os.fspath(path) if isinstance(path, os.PathLike) else path
        if tag is None and isinstance(text, str) and text.startswith(f"{root}/"):
            tag, _, text = text.removeprefix(f"{root}/").partition("/")
        return self._open_files([text], tag, attempt)[0]

    def open_files(
        self,
        paths: Sequence[str | os.PathLike[str]],
        tag: str,
        attempt: str | None,
    ) -> list[tuple[ReadFile, FileEntry]]:
        """Opens several files of one commit of a published tag; as `open_file`."""
        return self._open_files([os.fspath(path) for path in paths], tag, attempt)

    def _open_files(
        self, paths: Sequence[object], tag: str | None, attempt: str | None
    ) -> list[tuple[ReadFile, FileEntry]]:
        root = self._storage.root
        while True:
            manifest = self.manifest(tag) if tag is not None else self._latest()
            if manifest is None:
                raise CheckpointNotFoundError(f"nothing is published in {root!r}")
            if attempt not in (None, manifest.attempt):
                raise CheckpointNotFoundError(
                    f"tag {manifest.tag!r} in {root!r} is another save than the one that "
                    f"rank 0 has: made by {manifest.attempt}, not {attempt}"
                )
            own = [f"{root}/{manifest.tag}"]
            relative = [check_path(path, own) for path in paths]
            with contextlib.ExitStack() as stack:
                opened: list[tuple[ReadFile, FileEntry]] = []
                try:
                    for path in relative:
                        opened.append(self._open_entry(manifest, path))
                        stack.callback(opened[-1][0].close)
                except (CheckpointNotFoundError, CorruptCheckpointError):
                    if self._is_current(manifest):
                        raise
                    continue
                # Opened between two equal looks, they are the manifest's files; else
                # the tag was overwritten, or deleted, in between.
                if self._is_current(manifest):
                    stack.pop_all()
                    return opened

    def _is_current(self, manifest: Manifest) -> bool:
        try:
            return self.manifest(manifest.tag).attempt == manifest.attempt
        except CheckpointNotFoundError:
            return False

    def _open_entry(
        self, manifest: Manifest, relative: str
    ) -> tuple[ReadFile, FileEntry]:
        tag = manifest.tag
        entries = {entry.path: entry for entry in manifest.files}
        if relative not in entries:
            known = ", ".join(map(repr, entries))
            message = f"tag {tag!r} has no file {relative!r}; it has {known}"
            raise CheckpointNotFoundError(message)
        entry = entries[relative]
        if entry.place != manifest.place:
            host = manifest.hosts.get(entry.place, "?")
            message = (
                f"{relative!r} of tag {tag!r} lies on another disk: that of rank "
                f"{entry.place} on host {host!r}"
            )
            raise CheckpointNotFoundError(message)
        file = self._storage.open_read(f"{tag}/{relative}")
        if file.nbytes != entry.nbytes:
            file.close()
            message = f"{file.path}: {file.nbytes} bytes, not {entry.nbytes} as written"
            raise CorruptCheckpointError(
                message, path=file.path, offset=min(file.nbytes, entry.nbytes)
            )
        return file, entry


def is_about_content(error: CheckpointError) -> bool:
    """Whether what stands there is wrong, not the way to it."""
    return not isinstance(error, StorageError) or error.errno in _WRONG_KIND
