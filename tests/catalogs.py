"""Tags made by hand: a catalog without an engine, and what stands in a root."""

import contextlib
import os
import zlib
from collections.abc import Generator, Mapping
from pathlib import Path

from aiockpt.catalog import Catalog
from aiockpt.manifest import FileEntry, Manifest
from aiockpt.storage.base import Storage
from aiockpt.storage.local import LocalStorage
from aiockpt.threads import WorkerPool

Content = Mapping[str, bytes]

SOME: Content = {"model.pt": b"model " * 100, "sub/opt.pt": b"optimizer"}

# Reading and catalog work take no workers.
_NO_WORKERS = WorkerPool(1, "unused")


def storage_at(root: Path) -> LocalStorage:
    return LocalStorage(str(root), _NO_WORKERS)


@contextlib.contextmanager
def catalog_at(root: Path, storage: Storage | None = None) -> Generator[Catalog]:
    """The catalog of one more engine; its work area is closed in the end."""
    catalog = Catalog(storage or storage_at(root))
    try:
        yield catalog
    finally:
        catalog.close_work()


def prepare(catalog: Catalog, root: Path, content: Content = SOME) -> dict[str, object]:
    """Writes an attempt's files; the arguments for `publish`, but for the tag's."""
    catalog.open_work()
    directory, attempt = catalog.new_directory()
    entries = []
    for path, data in content.items():
        full = root / directory / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_bytes(data)
        entries.append(FileEntry(path=path, nbytes=len(data), crc32=zlib.crc32(data)))
    parents = {os.path.dirname(path) for path in content} - {""}
    return {
        "attempt": attempt,
        "directory": directory,
        "subdirectories": sorted(parents),
        "files": entries,
        "world_size": 1,
    }


def publish(  # noqa: PLR0913 - what `Catalog.publish` has
    catalog: Catalog,
    root: Path,
    tag: str,
    content: Content = SOME,
    *,
    is_overwrite: bool = False,
    points_latest: bool = True,
    number: int = 0,
) -> Manifest:
    """Publishes `content` as `tag`, and removes what took its place."""
    prepared = prepare(catalog, root, content)
    manifest = catalog.publish(
        tag,
        is_overwrite=is_overwrite,
        points_latest=points_latest,
        number=number,
        **prepared,
    )
    catalog.discard(prepared["directory"])
    return manifest


def make_tags(root: Path, *tags: str) -> None:
    """Publishes `SOME` under each of `tags`, by an engine that is gone again."""
    with catalog_at(root) as catalog:
        for tag in tags:
            publish(catalog, root, tag)


def names_in(root: Path) -> list[str]:
    """What a user sees in a root: all but the hidden."""
    return sorted(path.name for path in root.iterdir() if path.name[0] != ".")


def leftovers(root: Path) -> list[str]:
    """What aiockpt has not cleaned up: all in its directory but the root's lock."""
    private = root / ".aiockpt"
    clean = {private / "lock", private / "work"}
    return sorted(
        str(path.relative_to(private))
        for path in private.rglob("*")
        if path not in clean
    )
