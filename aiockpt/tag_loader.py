"""Loading files of published tags, on every rank from the same tag."""

__all__ = ["TagLoader"]

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec

from aiockpt.catalog import Catalog
from aiockpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    InvalidArgumentError,
    PeerError,
)
from aiockpt.loader import Loader, LoadOptions, Opened
from aiockpt.manifest import FileEntry, Manifest
from aiockpt.ranks.base import Ranks
from aiockpt.storage.base import ReadFile
from aiockpt.threads import outlast, run_blocking

_logger = logging.getLogger(__name__)

_Path = str | os.PathLike[str]
# A tag, and the attempt that has published it. Roots of several nodes can have a tag
# of one name from different attempts: an overwrite that was cut short.
_Commit = tuple[str, str]


class TagLoader:
    """Loads from the tags of one root, with the parts that it is given."""

    def __init__(
        self, catalog: Catalog, loader: Loader, ranks: Ranks, clerks: Executor
    ) -> None:
        """Owns nothing."""
        self._catalog = catalog
        self._loader = loader
        self._ranks = ranks
        self._clerks = clerks

    def opener(
        self, path: _Path, tag: str | None, attempt: str | None = None
    ) -> Callable[[], Opened]:
        """What opens a file of a tag (of an attempt), in a worker."""
        return partial(self._open, path, tag, attempt)

    def _open(self, path: _Path, tag: str | None, attempt: str | None) -> Opened:
        file, entry = self._catalog.open_file(path, tag, attempt)
        return file, entry.crc32

    async def load(self, path: _Path, tag: str | None, options: LoadOptions) -> Any:
        """What was saved as one file of a published tag.

        Where no tag is given, all ranks must call this: they load from the same.
        """
        commit = await self._common_commit(path, tag)
        return await self._loader.load(self.opener(path, *commit), options)

    async def load_bytes(self, path: _Path, tag: str | None) -> bytes:
        """The bytes of one file of a published tag; as `load`."""
        commit = await self._common_commit(path, tag)
        return await self._loader.load_bytes(self.opener(path, *commit))

    async def _common_commit(
        self, path: object, tag: str | None
    ) -> tuple[str | None, str | None]:
        is_given = tag is not None or str(path).startswith("/")
        if is_given or self._ranks.world_size == 1:
            return tag, None

        async def decide(_words: Sequence[bytes]) -> bytes:
            latest = await run_blocking(self._clerks, self._catalog.latest_commit)
            return _encode([] if latest is None else [latest])

        told = _decode(await self._ranks.consult("latest", b"", decide))
        if not told:
            raise CheckpointNotFoundError("nothing is published in the root of rank 0")
        return told[0]

    async def load_latest_valid(
        self, paths: Sequence[_Path], options: LoadOptions
    ) -> tuple[str, list[Any]]:
        """The newest tag from which all of `paths` load, and what they hold.

        All ranks must call this: it is the newest that is sound for every one.

        Raises:
            CheckpointNotFoundError: There is no such tag, and why for each; or a key
                of `options` names nothing.
            InvalidArgumentError: No paths, or targets for more than one.
            PeerError: Another rank failed or gave up.

        If cancelled: reading ends soon; where some tag was looked at, the other ranks
        are told.
        """
        if not paths or (options.into is not None and len(paths) > 1):
            what = "one path, to fill targets from" if paths else "at least one path"
            raise InvalidArgumentError(f"give {what}")
        skipped: list[str] = []
        for tag, attempt in await self._candidates():
            try:
                states, fault = await self._load_all(paths, (tag, attempt), options)
                text = await self._faults_of_all(tag, fault)
            except BaseException as error:
                # A `PeerError` is what all ranks were told.
                if not isinstance(error, PeerError):
                    told = error if isinstance(error, Exception) else _cancelled()
                    await outlast(self._ranks.object(f"valid {tag}", told, "load"))
                raise
            if not text:
                return tag, states
            _logger.warning("tag %s is skipped: %s", tag, text)
            skipped.append(f"{tag}: {text}")
        text = "\n  ".join(["no tag can be loaded:", *skipped])
        raise CheckpointNotFoundError(text)

    async def _candidates(self) -> list[_Commit]:
        async def decide(_words: Sequence[bytes]) -> bytes:
            tags = await run_blocking(self._clerks, self._catalog.latest_first)
            return _encode(tags)

        if self._ranks.world_size == 1:
            # Without a consultation, which a cancellation does not end.
            return _decode(await decide([]))
        return _decode(await self._ranks.consult("candidates", b"", decide))

    async def _load_all(
        self, paths: Sequence[_Path], commit: _Commit, options: LoadOptions
    ) -> tuple[list[Any], CheckpointError | None]:
        """What `paths` of a tag hold, or what is wrong with one of them."""
        tag, attempt = commit
        with ExitStack() as stack:
            # Alone, whatever has taken the tag's place meanwhile is as good.
            wanted = attempt if self._ranks.world_size > 1 else None

            def open_all() -> list[tuple[ReadFile, FileEntry]]:
                opened = self._catalog.open_files(paths, tag, wanted)
                # Here: a cancellation that comes meanwhile drops what is returned.
                for file, _ in opened:
                    stack.callback(file.close)
                return opened

            try:
                opened = await run_blocking(self._clerks, open_all)
            except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                return [], error
            try:
                return [
                    await self._loader.load(_opened(*each), options) for each in opened
                ], None
            except CorruptCheckpointError as error:
                return [], error

    async def _faults_of_all(self, tag: str, fault: CheckpointError | None) -> str:
        """What any rank found wrong with a tag; empty if it is sound for all."""
        if self._ranks.world_size == 1:
            return str(fault or "")

        async def decide(words: Sequence[bytes]) -> bytes:  # noqa: ASYNC124 - as `consult` wants it
            found = [
                f"rank {rank}: {word.decode()}"
                for rank, word in enumerate(words)
                if word
            ]
            return "; ".join(found).encode()

        word = str(fault or "").encode()
        return (await self._ranks.consult(f"valid {tag}", word, decide)).decode()


def _encode(manifests: Sequence[Manifest]) -> bytes:
    return msgspec.json.encode([(each.tag, each.attempt) for each in manifests])


def _decode(verdict: bytes) -> list[_Commit]:
    return msgspec.json.decode(verdict, type=list[_Commit])


def _opened(file: ReadFile, entry: FileEntry) -> Callable[[], Opened]:
    return lambda: (file, entry.crc32)


def _cancelled() -> EngineStateError:
    return EngineStateError("loading was cancelled")
