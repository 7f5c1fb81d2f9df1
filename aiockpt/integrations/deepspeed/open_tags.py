"""A tag that is being saved through DeepSpeed's interface, and where it lies.

The interface names a tag, not its directory: that is found from the paths of the files
(`ROOT/TAG/file`), where `create` was not told it. In a job of several ranks one that
saves nothing never sees a path, so the ranks tell each other.
"""

__all__ = ["OpenTag", "Verdict", "refuse", "tell"]

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from aiockpt.errors import CheckpointError
from aiockpt.opening import TagOptions
from aiockpt.ranks.base import Ranks
from aiockpt.runtime import Runtime
from aiockpt.single_files import SingleFile


@dataclass(slots=True, kw_only=True)
class OpenTag:
    """What has been saved between `create` and the end of `commit`.

    Attributes:
        tag: Its name.
        root: The directory that it is to be published in, absolute; None where the
            paths of the files say it, which may name several.
        options: How it is to be published.
        runtimes: Where it is open, by root.
        used: The roots in which this rank has saved a file of it, or tried to.
        singles: Files outside the tag, which `commit` publishes each on its own.
        failure: Why it cannot be committed, where that is known already.
        is_told: Whether the other ranks know of the failure: none of them will meet
            this one about the tag any more.
    """

    tag: str
    root: str | None
    options: TagOptions
    runtimes: dict[str, Runtime] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    singles: list[SingleFile] = field(default_factory=list)
    failure: CheckpointError | None = None
    is_told: bool = False

    def raise_if_told(self) -> None:
        """Raises the failure that all ranks know of, if there is one."""
        if self.is_told and self.failure is not None:
            # A copy: one instance raised twice would collect both tracebacks.
            raise copy.copy(self.failure) from self.failure

    def root_of(self, path: str) -> str | None:
        """The root where `path`, absolute, is a file of this tag; None if it is none."""
        if self.root is not None:
            return self.root if path.startswith(f"{self.root}/{self.tag}/") else None
        root, separator, _ = path.rpartition(f"/{self.tag}/")
        return (root or "/") if separator else None


class Verdict(msgspec.Struct, frozen=True):
    """What the ranks know of a tag together; and as a word, what one of them knows.

    Attributes:
        roots: Where it is to be opened.
        used: The roots in which there are files of it.
        has_singles: Whether there are files outside of it.
        is_complete: Whether all files have been saved.
    """

    roots: frozenset[str]
    used: frozenset[str]
    has_singles: bool
    is_complete: bool


async def tell(ranks: Ranks, tag: str, word: Verdict) -> Verdict:
    """Tells the other ranks of a tag; returns what all have told.

    Every rank calls this as often as it takes until all say `is_complete`.

    Raises:
        PeerError: A rank failed, or was lost.

    If cancelled: as `Ranks.consult`.
    """
    verdict = await ranks.consult(_topic(tag), msgspec.json.encode(word), _unite)
    return msgspec.json.decode(verdict, type=Verdict)


async def refuse(ranks: Ranks, tag: str, error: Exception) -> Exception:
    """Makes the next `tell` of all ranks fail; returns what this one is to raise.

    If cancelled: it is finished first.
    """
    return await ranks.object(_topic(tag), error, "save") or error


def _topic(tag: str) -> str:
    return f"roots of {tag}"


async def _unite(words: Sequence[bytes]) -> bytes:  # noqa: ASYNC124 - as `consult` wants it
    told = [msgspec.json.decode(word, type=Verdict) for word in words]
    verdict = Verdict(
        roots=frozenset().union(*(each.roots for each in told)),
        used=frozenset().union(*(each.used for each in told)),
        has_singles=any(each.has_singles for each in told),
        is_complete=all(each.is_complete for each in told),
    )
    return msgspec.json.encode(verdict)
