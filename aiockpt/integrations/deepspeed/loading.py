"""Loading a file by its path, whoever wrote it."""

__all__ = ["load_file"]

import os
from functools import partial
from typing import Any

from aiockpt.loader import LoadOptions, Opened
from aiockpt.machinery import Machinery
from aiockpt.manifest import MANIFEST_PATH
from aiockpt.tag_reader import TagReader


async def load_file(machinery: Machinery, path: str, options: LoadOptions) -> Any:
    """What was saved as the file `path`, which is absolute.

    If a manifest lists it, it is the file that the manifest describes.

    Raises:
        CheckpointNotFoundError: No such file.
        CorruptCheckpointError: It is no checkpoint, or its checksums do not hold.
        StorageError: The file system refused.

    If cancelled: reading ends soon, and nothing is returned.
    """
    return await machinery.loader.load(partial(_open, machinery, path), options)


def _open(machinery: Machinery, path: str) -> Opened:
    tag_dir = _tag_dir(os.path.dirname(path))  # noqa: PTH120
    if tag_dir is not None:
        root, tag = os.path.split(tag_dir)
        reader = TagReader(machinery.storage(root))
        relative = path.removeprefix(f"{tag_dir}/")
        if any(entry.path == relative for entry in reader.manifest(tag).files):
            file, entry = reader.open_file(relative, tag)
            return file, entry.crc32
    # The path is the caller's word, not a file's: links in it are followed.
    directory, name = os.path.split(os.path.realpath(path))
    return machinery.storage(directory).open_read(name), None


def _tag_dir(directory: str) -> str | None:
    """The published tag that a directory is, or lies in."""
    while True:
        if os.path.exists(f"{directory}/{MANIFEST_PATH}"):  # noqa: PTH110
            return directory
        parent = os.path.dirname(directory)  # noqa: PTH120
        if parent == directory:
            return None
        directory = parent
