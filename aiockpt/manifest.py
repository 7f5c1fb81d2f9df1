"""The manifest: what a published tag consists of, and names that are allowed.

`TAG/.aiockpt/manifest.json` is data only (JSON). It is written last, lists every
file with its length and CRC-32, and ends with a CRC-32 of itself. Readers trust
it and nothing else.
"""

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_PATH",
    "PRIVATE_DIR",
    "FileEntry",
    "Manifest",
    "TagInfo",
    "check_path",
    "check_tag",
    "decode",
    "encode",
]

import posixpath
import zlib
from collections.abc import Sequence

import msgspec

from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError

FORMAT_VERSION = 1
PRIVATE_DIR = ".aiockpt"
MANIFEST_PATH = f"{PRIVATE_DIR}/manifest.json"

# The longest name that common file systems take in one component.
_MAX_NAME_BYTES = 255


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a tag.

    Attributes:
        path: Relative to the tag, with forward slashes.
        nbytes: Exact length.
        crc32: CRC-32 of the whole file.
        rank: The rank that wrote it.
        place: The root in which it lies, where the ranks of a job have several (each
            node its own disk): the number of the rank that published there.
    """

    path: str
    nbytes: int
    crc32: int
    rank: int = 0
    place: int = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a reader needs to know a tag complete.

    Attributes:
        tag: The name under which it was published.
        attempt: Unique name of the attempt that wrote it.
        published_ns: When it was published: nanoseconds since the epoch, strictly
            increasing over the tags of a root.
        world_size: Ranks that took part.
        files: Every file except this one, sorted by path, of all places.
        place: The place of this manifest; `files` of another one are not here.
        hosts: The host of each place, by its number, where there are several.
        versions: Of aiockpt and torch, for people.
    """

    format_version: int = FORMAT_VERSION
    tag: str
    attempt: str
    published_ns: int
    world_size: int
    files: tuple[FileEntry, ...]
    place: int = 0
    hosts: dict[int, str] = {}
    versions: dict[str, str]
    crc32: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.nbytes for entry in self.files)

    @property
    def local_files(self) -> tuple[FileEntry, ...]:
        """The files that lie beside this manifest."""
        return tuple(entry for entry in self.files if entry.place == self.place)


class TagInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A published tag, as `tags()` lists it.

    Attributes:
        tag: Its name.
        published_ns: When it was published, nanoseconds since the epoch.
        nbytes: Bytes of all its files.
        files: Its files.
        world_size: Ranks that wrote it.
    """

    tag: str
    published_ns: int
    nbytes: int
    files: tuple[FileEntry, ...]
    world_size: int

    @classmethod
    def of(cls, manifest: Manifest) -> "TagInfo":
        """The listing of one manifest."""
        return cls(
            tag=manifest.tag,
            published_ns=manifest.published_ns,
            nbytes=manifest.nbytes,
            files=manifest.files,
            world_size=manifest.world_size,
        )


def encode(manifest: Manifest) -> bytes:
    """The manifest as it stands on disk, its own checksum filled in."""
    body = _dump(msgspec.structs.replace(manifest, crc32=0))
    return _dump(msgspec.structs.replace(manifest, crc32=zlib.crc32(body)))


def decode(data: bytes, path: str) -> Manifest:
    """Reads a manifest back.

    Args:
        data: The whole file.
        path: Where it was read from, for messages.

    Raises:
        CorruptCheckpointError: Any byte differs from what `encode` wrote, a file
            lies outside the tag, or the format is newer than this version of aiockpt.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != FORMAT_VERSION:
            message = f"{path}: manifest format {version} is not {FORMAT_VERSION}"
            raise CorruptCheckpointError(message, path=path)
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"{path}: not a manifest: {error}"
        raise CorruptCheckpointError(message, path=path) from error
    if encode(manifest) != data:
        message = f"{path}: the manifest fails its own checksum"
        raise CorruptCheckpointError(message, path=path)
    for entry in manifest.files:
        if not _is_inside(entry.path):
            message = f"{path}: {entry.path!r} is not a file inside the tag"
            raise CorruptCheckpointError(message, path=path)
    return manifest


def _is_inside(path: str) -> bool:
    try:
        return check_path(path, ()) == path
    except InvalidArgumentError:
        return False


class _Version(msgspec.Struct):
    format_version: int


def _dump(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def check_tag(tag: object) -> str:
    """`tag`, if it can be a directory of a root.

    Raises:
        InvalidArgumentError: Not a string, empty, too long, starting with a dot,
            beginning or ending with white space (which readers of `latest` strip), or
            holding `/`, NUL, a newline or another control character. `latest` is
            taken by the pointer file.
    """
    if not isinstance(tag, str):
        raise InvalidArgumentError(f"a tag is a string, not {tag!r}")
    if not tag:
        raise InvalidArgumentError("a tag cannot be empty")
    if tag.startswith("."):
        raise InvalidArgumentError(f"a tag cannot start with a dot: {tag!r}")
    if tag != tag.strip():
        message = f"a tag cannot begin or end with white space: {tag!r}"
        raise InvalidArgumentError(message)
    if "/" in tag or "\\" in tag or not _is_printable(tag):
        message = f"a tag is one plain directory name, not {tag!r}"
        raise InvalidArgumentError(message)
    if tag == "latest" or tag.startswith("latest."):
        message = f"{tag!r} is the name of the pointer file, not of a tag"
        raise InvalidArgumentError(message)
    _check_name(tag, tag)
    return tag


def check_path(path: object, tag_dirs: Sequence[str]) -> str:
    """`path` relative to its tag, normalised, if it stays inside the tag.

    Args:
        path: A string or path object; an absolute one may lie in any of `tag_dirs`.
        tag_dirs: Absolute directories under which the tag is known to callers.

    Raises:
        InvalidArgumentError: It is empty, escapes the tag, names the tag itself or
            aiockpt's own directory, or holds NUL.
    """
    to_text = getattr(path, "__fspath__", None)
    text = to_text() if to_text is not None else path
    if not isinstance(text, str) or not text:
        raise InvalidArgumentError(f"a path is a non-empty string, not {path!r}")
    if "\\" in text or not _is_printable(text):
        raise InvalidArgumentError(f"unusable characters in the path {text!r}")
    relative = _relative(text, tag_dirs)
    parts = relative.split("/")
    if ".." in parts or relative in {"", "."} or text.endswith("/"):
        raise InvalidArgumentError(f"{text!r} is not a file inside the tag")
    if parts[0] == PRIVATE_DIR:
        raise InvalidArgumentError(f"{PRIVATE_DIR!r} is aiockpt's own directory")
    for part in parts:
        _check_name(part, text)
    return relative


def _relative(text: str, tag_dirs: Sequence[str]) -> str:
    if not text.startswith("/"):
        # Not normalised: `a/../../b` must be seen as the escape that it is.
        return text if ".." in text.split("/") else posixpath.normpath(text)
    normal = posixpath.normpath(text)
    for tag_dir in tag_dirs:
        if normal.startswith(f"{tag_dir}/"):
            return normal[len(tag_dir) + 1 :]
    places = " or ".join(tag_dirs)
    raise InvalidArgumentError(f"{text!r} lies outside the tag ({places})")


def _is_printable(text: str) -> bool:
    return all(char >= " " for char in text)


def _check_name(name: str, whole: str) -> None:
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{whole!r} is not valid Unicode") from error
    if len(encoded) > _MAX_NAME_BYTES:
        message = f"{whole!r}: a name is at most {_MAX_NAME_BYTES} bytes"
        raise InvalidArgumentError(message)
