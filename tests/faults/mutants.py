"""Row 20: aiockpt, broken on purpose, in the ways in which others lost checkpoints.

Each mutant takes a `pytest.MonkeyPatch` and breaks one rule. None of them is subtle:
what the matrix does not catch of these, it would not catch of a mistake.
"""

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aiockpt import catalog
from aiockpt.agreement import Agreement, Share
from aiockpt.attempt import Attempt
from aiockpt.catalog import Catalog
from aiockpt.errors import UnsafePickleError
from aiockpt.leases import Leases
from aiockpt.loading.unpickling import Unpickling
from aiockpt.manifest import FileEntry
from aiockpt.storage import local, local_calls, local_write
from aiockpt.storage.local import LocalStorage
from aiockpt.tag_loader import TagLoader
from aiockpt.tag_reader import LATEST

WriteFile = local_write.LocalWriteFile
Mutant = Callable[[pytest.MonkeyPatch], object]


def no_file_sync(patch: pytest.MonkeyPatch) -> None:
    def sync(file: Any) -> None:
        local.os.ftruncate(file._descriptor, file._nbytes)

    patch.setattr(WriteFile, "_sync", sync)


def no_directory_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalStorage, "sync_dir", lambda _storage, _path: None)


def files_synced_after_the_rename(patch: pytest.MonkeyPatch) -> None:
    unsynced: list[str] = []
    rename = LocalStorage.rename_dir

    def sync(file: Any) -> None:
        local.os.ftruncate(file._descriptor, file._nbytes)
        unsynced.append(file._full)

    def rename_dir(storage: LocalStorage, source: str, target: str) -> None:
        rename(storage, source, target)
        for full in unsynced:
            path = full.replace(f"/{source}/", f"/{target}/")
            with contextlib.suppress(FileNotFoundError):
                descriptor = local.os.open(path, os.O_RDONLY)
                local.os.fsync(descriptor)
                local.os.close(descriptor)

    patch.setattr(WriteFile, "_sync", sync)
    patch.setattr(LocalStorage, "rename_dir", rename_dir)


def manifest_synced_before_it_is_written(patch: pytest.MonkeyPatch) -> None:
    """As torch's distributed checkpoint does it: the buffer is flushed too late."""

    def write_durable(storage: LocalStorage, path: str, data: bytes) -> None:
        full = storage._full(path)
        descriptor = local.os.open(full, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        local.os.fsync(descriptor)
        local.os.write(descriptor, data)
        local.os.close(descriptor)

    patch.setattr(LocalStorage, "write_durable", write_durable)


def old_tag_removed_before_the_new_one_is_shown(patch: pytest.MonkeyPatch) -> None:
    """As torch's distributed checkpoint does it with its metadata."""

    def exchange(storage: LocalStorage, one: str, other: str) -> None:
        with local_calls.errors_name(other):
            local.shutil.rmtree(storage._full(other))
            local.os.rename(storage._full(one), storage._full(other))

    patch.setattr(LocalStorage, "exchange", exchange)


def published_before_the_files_are_written(patch: pytest.MonkeyPatch) -> None:
    async def commit(attempt: Attempt, number: int) -> None:
        attempt._seal(is_sealed=True)
        for save in attempt.saves:
            # Nothing tells a mutant when; it is no part of the engine.
            while not (nbytes := save.progress.planned_bytes):  # noqa: ASYNC110
                await asyncio.sleep(0)
            save.entry = FileEntry(path=save.path, nbytes=nbytes, crc32=0)
        await attempt._publish(number)

    patch.setattr(Attempt, "commit", commit)
    patch.setattr(Catalog, "_check_written", lambda *_: None)


def short_write_taken_for_a_whole_one(patch: pytest.MonkeyPatch) -> None:
    write_once = WriteFile._write_once

    def write_all(file: Any, view: memoryview, offset: int) -> int:
        write_once(file, view, offset)
        return len(view)

    patch.setattr(WriteFile, "_write_once", write_all)


def failed_sync_tried_again(patch: pytest.MonkeyPatch) -> None:
    sync = WriteFile._sync

    def sync_again(file: Any) -> None:
        try:
            sync(file)
        except OSError:
            sync(file)

    patch.setattr(WriteFile, "_sync", sync_again)


def failed_sync_of_a_tag_not_undone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Catalog, "_hide", lambda *_args, **_kwargs: None)


def checksums_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    load = TagLoader.load

    async def load_unchecked(
        loader: TagLoader, path: Any, tag: str | None, options: Any
    ) -> Any:
        return await load(loader, path, tag, replace(options, verify=False))

    patch.setattr(TagLoader, "load", load_unchecked)


def acknowledged_before_the_rename(patch: pytest.MonkeyPatch) -> None:
    """The rename follows when the engine is closed."""
    late: list[Callable[[], object]] = []
    publish, close_work = Catalog.publish, Catalog.close_work

    def publish_late(*args: Any, **kwargs: Any) -> None:
        late.append(lambda: publish(*args, **kwargs))

    def publish_and_close(catalog: Catalog) -> None:
        while late:
            late.pop()()
        close_work(catalog)

    patch.setattr(Catalog, "publish", publish_late)
    patch.setattr(Catalog, "discard", lambda _catalog, _directory: None)
    patch.setattr(Catalog, "close_work", publish_and_close)


def latest_moved_before_the_tag_is_there(patch: pytest.MonkeyPatch) -> None:
    show = Catalog._show

    def point_and_show(
        catalog: Catalog, tag: str, directory: str, *, is_swap: bool
    ) -> None:
        catalog._point_latest(tag)
        show(catalog, tag, directory, is_swap=is_swap)

    patch.setattr(Catalog, "_show", point_and_show)


def latest_written_in_place(patch: pytest.MonkeyPatch) -> None:
    replace_file = LocalStorage.replace

    def write_over(storage: LocalStorage, source: str, target: str) -> None:
        if target != LATEST:
            replace_file(storage, source, target)
            return
        with local_calls.errors_name(target):
            with open(storage._full(source), "rb") as file:
                data = file.read()
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            descriptor = local.os.open(storage._full(target), flags, 0o666)
            try:
                local.os.write(descriptor, data)
            finally:
                local.os.close(descriptor)
            local.os.unlink(storage._full(source))

    patch.setattr(LocalStorage, "replace", write_over)


def unsafe_pickle_run_after_all(patch: pytest.MonkeyPatch) -> None:
    """The fallback that others have: what is refused is run all the same."""
    run_safely = Unpickling._run_safely

    def run(unpickling: Unpickling, data: bytes, storages: Any) -> object:
        try:
            return run_safely(unpickling, data, storages)
        except UnsafePickleError:
            return unpickling._run_trusted(data, storages)

    patch.setattr(Unpickling, "_run_safely", run)


def write_left_behind_when_cancelled(patch: pytest.MonkeyPatch) -> None:
    """The plain `await` of a thread: the waiter goes, the thread goes on reading."""

    async def abandon(
        pool: Any, work: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        return await asyncio.wrap_future(pool.submit(work, *args, **kwargs))

    patch.setattr(local_write, "run_blocking", abandon)


def living_engines_swept(patch: pytest.MonkeyPatch) -> None:
    lock = LocalStorage.lock

    def lock_anew(storage: LocalStorage, path: str, **how: bool) -> Any:
        return lock(storage, path if how["wait"] else f"{path}.mine", **how)

    patch.setattr(LocalStorage, "lock", lock_anew)


def tags_changed_without_the_lock(patch: pytest.MonkeyPatch) -> None:
    """And a directory moves over another: the last writer wins, not the first."""

    def rename_dir(storage: LocalStorage, source: str, target: str) -> None:
        shutil.rmtree(storage._full(target), ignore_errors=True)
        os.rename(storage._full(source), storage._full(target))

    patch.setattr(LocalStorage, "rename_dir", rename_dir)
    patch.setattr(Catalog, "check_free", lambda *_args, **_kwargs: None)


def errors_of_the_disk_swallowed(patch: pytest.MonkeyPatch) -> None:
    write_once = WriteFile._write_once

    def write_or_not(file: Any, view: memoryview, offset: int) -> int:
        try:
            return write_once(file, view, offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(view)

    patch.setattr(WriteFile, "_write_once", write_or_not)


# --- what came later --------------------------------------------------------------


def failure_of_a_rank_told_to_nobody(patch: pytest.MonkeyPatch) -> None:
    async def refuse(_agreement: Agreement, _error: Exception, _phase: str) -> None:
        pass

    patch.setattr(Agreement, "refuse", refuse)


def published_before_all_ranks_have_told(patch: pytest.MonkeyPatch) -> None:
    publish = Agreement.publish

    async def publish_own(agreement: Agreement, share: Share, number: int) -> object:
        if agreement.is_publisher:
            await agreement._show(share.files)
        return await publish(agreement, share, number)

    patch.setattr(Agreement, "publish", publish_own)


def leases_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leases, "check_unread", lambda _leases, _tag: None)


def files_of_others_left_behind(patch: pytest.MonkeyPatch) -> None:
    for name in ("adopt", "adopt_late"):
        patch.setattr(catalog, name, lambda *_: None)
