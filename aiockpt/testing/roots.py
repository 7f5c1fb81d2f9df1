"""What must be true of a root directory at any moment, whatever was killed or failed."""

__all__ = ["assert_root_consistent"]

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from isal.isal_zlib import crc32

from aiockpt.errors import CheckpointError
from aiockpt.manifest import MANIFEST_PATH, PRIVATE_DIR, FileEntry, Manifest, decode
from aiockpt.storage.local import LocalStorage
from aiockpt.tag_reader import LATEST, TagReader

_BLOCK_BYTES = 1 << 20


def assert_root_consistent(
    root: str | os.PathLike[str],
    *,
    acked: Sequence[str] = (),
    absent: Collection[str] = (),
    is_swept: bool = False,
) -> list[str]:
    """Every tag of the root is whole, those acknowledged are there, `latest` is one.

    Checked are: each manifest, its own checksum and name; that a tag's files are those
    of its manifest and no others, regular, of their exact length and CRC-32; that no
    two tags were published at once; that `latest` is well formed; and that a reader
    comes to the tag acknowledged last, or one that was published after it.

    Files are read with nothing but the system's calls. It may run while engines
    read, not while they commit, overwrite or delete. It blocks: for threads.

    Args:
        root: The root directory; it may be missing if nothing was acknowledged.
        acked: Tags whose `commit` has returned, in the order of these returns, and
            that were not deleted since. A tag that was overwritten counts once, at
            its last commit.
        absent: Tags that must not be there: aborted, failed, or deleted.
        is_swept: An engine was opened and closed after the last crash, and none is
            open: then nothing may be left of work in progress.

    Returns:
        The published tags, oldest first.

    Raises:
        AssertionError: It is not so; lists everything that was found.
    """
    place = Path(root)
    problems: list[str] = []
    manifests = _manifests(place, problems)
    published = {manifest.tag: manifest for manifest in manifests}
    problems += [f"tag {tag!r} was acknowledged and is lost" for tag in acked
                 if tag not in published]  # fmt: skip
    problems += [f"tag {tag!r} must not be there" for tag in absent if tag in published]
    problems += _problems_of_latest(place, published, acked)
    if is_swept:
        problems += [f"{path} was left behind" for path in _leftovers(place)]
    if problems:
        found = "".join(f"\n- {problem}" for problem in problems)
        raise AssertionError(f"{place} is not consistent:{found}")
    return [manifest.tag for manifest in manifests]


def _manifests(root: Path, problems: list[str]) -> list[Manifest]:
    """What is published, oldest first; what is wrong with it goes to `problems`."""
    found: list[Manifest] = []
    for directory in sorted(root.iterdir()) if root.exists() else []:
        path = directory / MANIFEST_PATH
        if directory.name.startswith(".") or not path.exists():
            continue
        try:
            manifest = decode(path.read_bytes(), str(path))
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if manifest.tag != directory.name:
            problems.append(f"{path} is of tag {manifest.tag!r}")
        problems += _problems_of_files(directory, manifest)
        found.append(manifest)
    found.sort(key=lambda manifest: manifest.published_ns)
    if len({manifest.published_ns for manifest in found}) < len(found):
        problems.append("two tags were published at the same time")
    return found


def _problems_of_files(directory: Path, manifest: Manifest) -> Iterator[str]:
    entries = {entry.path: entry for entry in manifest.local_files}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        is_directory = stat.S_ISDIR(path.lstat().st_mode)
        if name not in {*entries, MANIFEST_PATH} and not is_directory:
            yield f"{path} is not in the manifest"
    for name, entry in entries.items():
        yield from _problems_of_file(directory / name, entry)


def _problems_of_file(path: Path, entry: FileEntry) -> Iterator[str]:
    try:
        status = path.lstat()
    except FileNotFoundError:
        yield f"{path} is missing"
        return
    if not stat.S_ISREG(status.st_mode):
        yield f"{path} is not a regular file"
    elif status.st_size != entry.nbytes:
        yield f"{path} has {status.st_size} bytes, not {entry.nbytes}"
    elif (found := _crc32(path)) != entry.crc32:
        yield f"{path} has CRC-32 {found:#010x}, not {entry.crc32:#010x}"


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            value = crc32(block, value)
    return value


def _problems_of_latest(
    root: Path, published: dict[str, Manifest], acked: Sequence[str]
) -> Iterator[str]:
    pointer = root / LATEST
    if pointer.exists() and not pointer.read_bytes().endswith(b"\n"):
        yield f"{pointer} is torn: {pointer.read_bytes()!r}"
    with ThreadPoolExecutor(1) as unused:
        try:
            latest = TagReader(LocalStorage(str(root), unused)).latest()
        except CheckpointError as error:
            yield f"a reader finds no latest tag: {error}"
            return
    if latest is None or latest not in published:
        if latest is not None or published:
            yield f"a reader takes {latest!r} for the latest tag"
        return
    last = published.get(acked[-1]) if acked else None
    if last is not None and published[latest].published_ns < last.published_ns:
        yield f"a reader takes {latest!r} for the latest; {last.tag!r} is newer"


def _leftovers(root: Path) -> list[Path]:
    private = root / PRIVATE_DIR
    lasting = {private / "lock", private / "work"}
    return sorted(path for path in private.rglob("*") if path not in lasting)
