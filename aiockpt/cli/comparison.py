"""How the tensors of two files, or of two tags, differ."""

__all__ = ["Change", "Difference", "compare"]

import contextlib
from pathlib import Path

import msgspec

from aiockpt.cli.places import Kind, Place, is_plain, manifest_of, opened
from aiockpt.cli.views import View, is_equal, views
from aiockpt.errors import CorruptCheckpointError, InvalidArgumentError
from aiockpt.manifest import FileEntry


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor whose dtype or shape differs, as `float32 (2, 3)` on either side."""

    key: str
    a: str
    b: str


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What differs; in tags, keys have their file before them: `model.pt:weight`.

    Attributes:
        a: One side.
        b: The other.
        is_same: Whether nothing below differs.
        only_in_a: Keys that the other side lacks.
        only_in_b: Keys that the one side lacks.
        changed: Tensors of another dtype or shape.
        different: Keys of tensors that differ in their bytes only.
        num_equal: Number of tensors that are equal, byte for byte.
    """

    a: str
    b: str
    is_same: bool
    only_in_a: list[str]
    only_in_b: list[str]
    changed: list[Change]
    different: list[str]
    num_equal: int


def compare(a: Place, b: Place) -> Difference:
    """Compares all tensors; values that are no tensors are not looked at.

    A pair of tensors that no checksum decides is read into memory.

    Raises:
        InvalidArgumentError: The sides are not two files or two tags.
        CorruptCheckpointError: Either side is damaged.
    """
    if a.kind != b.kind or a.kind is Kind.ROOT:
        message = (
            f"two files or two tags can be compared, not a {a.kind} and a {b.kind}"
        )
        raise InvalidArgumentError(message)
    with contextlib.ExitStack() as files:
        ours, theirs = _views(a, files), _views(b, files)
        changed = [
            Change(key=key, a=_kind(view), b=_kind(theirs[key]))
            for key, view in ours.items()
            if key in theirs and _kind(view) != _kind(theirs[key])
        ]
        alike = (ours.keys() & theirs.keys()) - {change.key for change in changed}
        different = [
            key
            for key, view in ours.items()
            if key in alike and not is_equal(view, theirs[key])
        ]
    only_in_a = [key for key in ours if key not in theirs]
    only_in_b = [key for key in theirs if key not in ours]
    return Difference(
        a=str(a.path),
        b=str(b.path),
        is_same=not (only_in_a or only_in_b or changed or different),
        only_in_a=only_in_a,
        only_in_b=only_in_b,
        changed=changed,
        different=different,
        num_equal=len(alike) - len(different),
    )


def _views(place: Place, files: contextlib.ExitStack) -> dict[str, View]:
    if place.kind is Kind.FILE:
        path = place.path
        return views(files.enter_context(opened(path.parent, path.name)))
    return {
        f"{entry.path}:{key}": view
        for entry in manifest_of(place.path).local_files
        for key, view in _views_of_entry(place.path, entry, files).items()
    }


def _views_of_entry(
    tag_dir: Path, entry: FileEntry, files: contextlib.ExitStack
) -> dict[str, View]:
    """The tensors of one file of a tag; a plain file has none."""
    try:
        return views(files.enter_context(opened(tag_dir, entry.path)))
    except (CorruptCheckpointError, InvalidArgumentError):
        if not is_plain(tag_dir, entry):
            raise
        return {}


def _kind(view: View) -> str:
    return f"{str(view.dtype).removeprefix('torch.')} {view.shape}"
