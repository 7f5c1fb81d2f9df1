"""How the ranks of a job open and publish a tag together.

Opening is one question: rank 0 makes the directory, everyone joins it. Publishing is
one question as well where all ranks share a root: each says which files it has made
durable, rank 0 publishes them and tells everyone the same report. Where nodes have
disks of their own (several *places*), those publish first and rank 0 last: its rename
is the commit point, and what the others showed is taken back if it fails.
"""

__all__ = ["Agreement", "Share", "TagOptions", "open_place"]

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from time import perf_counter

import msgspec

from aiockpt.catalog import Catalog
from aiockpt.errors import CheckpointError, InvalidArgumentError, PeerError
from aiockpt.events import CommitReport
from aiockpt.manifest import FileEntry, Manifest
from aiockpt.ranks.base import Ranks
from aiockpt.threads import finish, outlast, run_blocking

_logger = logging.getLogger(__name__)

_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True, kw_only=True)
class TagOptions:
    """How a tag is to be published.

    Attributes:
        is_overwrite: Whether it may take the place of a published tag.
        adopts: Whether files that others put into the tag's directory stay in it.
        points_latest: Whether `latest` is moved to it.
    """

    is_overwrite: bool = False
    adopts: bool = False
    points_latest: bool = True


class Place(msgspec.Struct, frozen=True):
    """Where this rank's part of an attempt is made.

    Attributes:
        directory: The attempt's directory, relative to the root.
        name: Unique among all attempts at all tags of the root.
        number: The rank that publishes in this root.
        hosts: The host of each place, by its number; empty where there is only one.
    """

    directory: str
    name: str
    number: int = 0
    hosts: dict[int, str] = {}


class Share(msgspec.Struct, frozen=True):
    """What one rank brings to a commit.

    Attributes:
        files: Its files, durable.
        costs: Its own part of the report.
    """

    files: tuple[FileEntry, ...]
    costs: CommitReport


class _Opening(msgspec.Struct, frozen=True):
    directory: str
    name: str


class _Verdict(msgspec.Struct, frozen=True):
    """Of rank 0: what was published; or nothing, as there is nothing, or not yet."""

    report: CommitReport | None
    is_empty: bool = False


async def open_place(
    ranks: Ranks, catalog: Catalog, clerks: Executor, tag: str, options: TagOptions
) -> Place:
    """Opens an attempt at `tag` on all ranks.

    Raises:
        EngineStateError: The tag is published, and not to be overwritten.
        InvalidArgumentError: A foreign file or directory has that name.
        StorageError: The root cannot be made or written; where ranks have a part in
            it, all raise a `PeerError` instead, whose cause this is where it happened.
        PeerError: A rank could not.

    If cancelled: before all ranks have called it, as if it had not been called; after
    that the tag is open, or nothing is open here and the other ranks are told.
    """

    def make() -> _Opening:
        catalog.check_free(
            tag, is_overwrite=options.is_overwrite, is_foreign_kept=options.adopts
        )
        catalog.open_work()
        return _Opening(*catalog.new_directory())

    async def decide(_words: Sequence[bytes]) -> bytes:
        return _encode(await run_blocking(clerks, make))

    verdict = await ranks.consult(f"create {tag}", b"", decide)
    opening = msgspec.json.decode(verdict, type=_Opening)
    place = Place(opening.directory, opening.name)
    if ranks.world_size == 1:
        return place
    try:
        hosts = await _join(ranks, catalog, clerks, place)
        if not hosts:
            return place
        number = await finish(_own_place(ranks, catalog, clerks, place))
    except BaseException:
        await outlast(_discard(catalog, clerks, place))
        raise
    return Place(place.directory, place.name, number, hosts)


async def _discard(catalog: Catalog, clerks: Executor, place: Place) -> None:
    try:
        await run_blocking(clerks, catalog.discard, place.directory)
    except CheckpointError as error:
        _logger.warning("%s remains to be swept: %s", place.directory, error)


async def _join(
    ranks: Ranks, catalog: Catalog, clerks: Executor, place: Place
) -> dict[int, str]:
    """Sees to it that all ranks have the directory; the hosts of the places."""
    topic = f"open {place.name}"

    async def decide(words: Sequence[bytes]) -> bytes:  # noqa: ASYNC124 - as `consult` wants it
        hosts = {rank: word.decode() for rank, word in enumerate(words) if word}
        return _encode(hosts if len(hosts) > 1 else {})

    try:
        is_leader = ranks.rank == 0 or await run_blocking(
            clerks, catalog.join, place.directory, ranks.rank
        )
        # No host is nameless: those without a name are no leaders.
        host = (os.uname().nodename or "localhost") if is_leader else ""
        verdict = await ranks.consult(topic, host.encode(), decide)
    except PeerError:
        # That is the verdict: there is nobody left to tell.
        raise
    except Exception as error:
        raise await outlast(ranks.object(topic, error, "create")) or error from error
    except BaseException:
        await outlast(ranks.object(topic, RuntimeError("cancelled"), "create"))
        raise
    return msgspec.json.decode(verdict, type=dict[int, str])


async def _own_place(
    ranks: Ranks, catalog: Catalog, clerks: Executor, place: Place
) -> int:
    """The rank that publishes in this root; known on all ranks, or nowhere open."""
    topic = f"place {place.name}"

    async def decide(_words: Sequence[bytes]) -> bytes:  # noqa: ASYNC124 - as `consult` wants it
        return b""

    try:
        number = await run_blocking(clerks, catalog.place, place.directory)
    except Exception as error:
        raise await ranks.object(topic, error, "create") or error from error
    await ranks.consult(topic, b"", decide)
    return number


_Decide = Callable[[Sequence[bytes]], Awaitable[_Verdict]]


class Agreement:
    """One attempt's way from files that are durable to a tag that is published.

    Attributes:
        place: Where the attempt is made.
    """

    def __init__(
        self,
        ranks: Ranks,
        catalog: Catalog,
        clerks: Executor,
        tag: str,
        place: Place,
        options: TagOptions,
    ) -> None:
        """Publishes nothing yet."""
        self.place = place
        self._ranks = ranks
        self._catalog = catalog
        self._clerks = clerks
        self._tag = tag
        self._options = options
        self._is_too_late = False
        self._is_publishing = False
        self._has_spoken = False
        self._is_kept = False
        self._refusal: Exception | None = None
        self._told: Exception | None = None
        self._objecting = asyncio.Lock()
        self._shares: list[Share] = []
        self._start_s = 0.0

    @property
    def meetings(self) -> str:
        """How the topics begin that ranks have while they save files together."""
        return f"save {self.place.name}"

    @property
    def is_publisher(self) -> bool:
        """Whether this rank is the one that publishes in its root."""
        return self._ranks.rank == self.place.number

    @property
    def is_publishing(self) -> bool:
        """Whether `publish` is under way, and has the last word on the attempt."""
        return self._is_publishing

    @property
    def may_discard(self) -> bool:
        """Whether nobody can be publishing what has been made in the place.

        As long as this rank has not said what it has, no rank publishes anything. From
        there on only the place's own publisher knows, when its `publish` has ended:
        another rank may have been told of a failure (it lost rank 0, say) while rank 0
        goes on, and where a tag is overwritten the directory then holds the old one.
        """
        if not self._has_spoken:
            return True
        return self.is_publisher and not (self._is_publishing or self._is_kept)

    async def refuse(self, error: Exception, phase: str) -> Exception | None:
        """Lets no rank publish this attempt.

        Returns:
            What every rank raises; None if it is too late: it is being published.

        If cancelled: it is finished first.
        """
        if self._is_too_late:
            return None
        self._refusal = self._refusal or error
        return await outlast(self._object(error, phase))

    async def _object(self, error: Exception, phase: str) -> Exception | None:
        # Once: a second objection would be one to the next use of the topic.
        async with self._objecting:
            if self._told is None and not self._is_too_late:
                self._told = await self._ranks.object(
                    self._topic("commit"), error, phase, scope=f"{self.meetings}/"
                )
            return self._told

    async def publish(self, share: Share) -> CommitReport | None:
        """Publishes the files of all ranks, once every rank has called this.

        Returns:
            What was published, the same on every rank; None if no rank has a file.

        Raises:
            PeerError: A rank failed, was lost, or did not come in time.
            CheckpointError: Publishing failed; nothing is to be seen.
            Exception: What this rank has refused with.

        If cancelled: before all ranks have called it, as if it had not been called;
        after that it is finished, and the cancellation is dropped.
        """
        if self._refusal is not None:
            # That was this rank's word: a second one would never be answered.
            raise self._refusal
        self._has_spoken = self._is_publishing = True
        try:
            return await self._publish(share)
        finally:
            self._is_publishing = False

    async def _publish(self, share: Share) -> CommitReport | None:
        self._start_s = perf_counter()
        share = _placed(share, self.place.number)
        # Alone, there is nobody to wait for.
        self._is_too_late = self._ranks.world_size == 1
        try:
            verdict = await self._consult("commit", _encode(share), self._decide)
        except asyncio.CancelledError:
            self._has_spoken = False  # The word has been withdrawn.
            raise
        except PeerError as error:
            await finish(self._tell_outcome(error))  # noqa: ASYNC120 - a cancellation tells more
            raise
        self._is_too_late = self._has_spoken = not verdict.is_empty
        if verdict.report is None and not verdict.is_empty:
            verdict = await finish(self._publish_places())
        return verdict.report

    async def _tell_outcome(self, error: PeerError) -> None:
        """Notes whether rank 0, which was lost, had published."""
        if not _is_undecided(error):
            return
        with contextlib.suppress(CheckpointError):
            manifest = await run_blocking(
                self._clerks, self._catalog.manifest, self._tag
            )
            if manifest.attempt == self.place.name:
                error.add_note(f"rank 0 had published tag {self._tag!r} before that")

    def _topic(self, step: str) -> str:
        return f"{step} {self._tag} ({self.place.name})"

    async def _consult(self, step: str, word: bytes, decide: _Decide) -> _Verdict:
        async def encoded(words: Sequence[bytes]) -> bytes:
            return _encode(await decide(words))

        verdict = await self._ranks.consult(self._topic(step), word, encoded)
        return msgspec.json.decode(verdict, type=_Verdict)

    # --- on rank 0 ------------------------------------------------------------

    async def _decide(self, words: Sequence[bytes]) -> _Verdict:
        """The commit: all ranks have said what they have."""
        self._shares = [msgspec.json.decode(word, type=Share) for word in words]
        files = _all_files(self._shares)
        if not files or self.place.hosts:
            return _Verdict(None, is_empty=not files)
        await self._show(files, step="commit")
        return _Verdict(self._report())

    def _report(self) -> CommitReport:
        took_s = perf_counter() - self._start_s
        return _merged([share.costs for share in self._shares], took_s)

    # --- several places -------------------------------------------------------

    async def _publish_places(self) -> _Verdict:
        """Shows the tag in every place, that of rank 0 last."""
        manifest: Manifest | None = None
        try:
            if self.is_publisher:
                files = await self._files_of_all()
                if self._ranks.rank != 0:
                    manifest = await self._show(files)
        except Exception as error:
            topic = self._topic("show")
            raise await self._ranks.object(topic, error, "publish") or error from error

        async def decide(_words: Sequence[bytes]) -> _Verdict:
            await self._show(_all_files(self._shares), step="show")
            return _Verdict(self._report())

        try:
            return await self._consult("show", b"", decide)
        except Exception as error:
            # Where nobody knows whether rank 0 has published, the tag must stay; and so
            # must the one that it has replaced.
            self._is_kept = _is_undecided(error)
            if manifest is not None and not self._is_kept:
                await self._retract(manifest)  # noqa: ASYNC120 - a cancellation tells more
            raise

    async def _files_of_all(self) -> tuple[FileEntry, ...]:
        """What the manifests say; only those who write one need it."""

        async def decide(_words: Sequence[bytes]) -> bytes:  # noqa: ASYNC124 - as `consult` wants it
            return _encode(_all_files(self._shares))

        group = sorted(self.place.hosts)
        topic = self._topic("manifest")
        verdict = await self._ranks.consult(topic, b"", decide, group=group)
        return msgspec.json.decode(verdict, type=tuple[FileEntry, ...])

    async def _retract(self, manifest: Manifest) -> None:
        try:
            directory = self.place.directory
            await run_blocking(self._clerks, self._catalog.retract, manifest, directory)
        except CheckpointError:
            _logger.exception("tag %s may still be seen in this root", self._tag)

    # --- in any place ---------------------------------------------------------

    async def _show(
        self, files: Sequence[FileEntry], *, step: str | None = None
    ) -> Manifest:
        """Publishes in this root; as what rank 0 decides on a step, or before that."""
        place = self.place
        loop = asyncio.get_running_loop()

        def insist() -> None:
            if step is not None:
                insisting = self._ranks.insist(self._topic(step))
                asyncio.run_coroutine_threadsafe(insisting, loop).result()

        own = [entry for entry in files if entry.place == place.number]
        return await run_blocking(
            self._clerks,
            self._catalog.publish,
            self._tag,
            place.name,
            place.directory,
            subdirectories=sorted({each for entry in own for each in _parents(entry)}),
            files=files,
            world_size=self._ranks.world_size,
            # Whether the tag is taken is for rank 0 to say. Elsewhere one of that name
            # is what a job left that died before rank 0 had published.
            is_overwrite=self._options.is_overwrite or place.number != 0,
            adopts=self._options.adopts,
            points_latest=self._options.points_latest,
            place=place.number,
            hosts=place.hosts,
            before_shown=insist,
        )


def _placed(share: Share, number: int) -> Share:
    files = (msgspec.structs.replace(each, place=number) for each in share.files)
    return Share(tuple(files), share.costs)


def _is_undecided(error: Exception) -> bool:
    """Whether rank 0 was lost: it may have published or not."""
    return isinstance(error, PeerError) and (error.rank, error.phase) == (0, "lost")


def _all_files(shares: Sequence[Share]) -> tuple[FileEntry, ...]:
    """The files of all ranks, if they can stand side by side."""
    files = sorted(
        (entry for share in shares for entry in share.files),
        key=lambda entry: entry.path.split("/"),
    )
    # Sorted by their parts, a file comes right before what would lie inside it.
    for one, other in itertools.pairwise(files):
        if other.path == one.path or other.path.startswith(f"{one.path}/"):
            raise InvalidArgumentError(
                f"{one.path!r} of rank {one.rank} and {other.path!r} of rank "
                f"{other.rank} cannot stand side by side"
            )
    return tuple(files)


def _merged(costs: Sequence[CommitReport], publish_s: float) -> CommitReport:
    return replace(
        costs[0],
        nbytes=sum(each.nbytes for each in costs),
        num_files=sum(each.num_files for each in costs),
        plan_s=sum(each.plan_s for each in costs),
        stage_s=max(each.stage_s for each in costs),
        write_s=max(each.write_s for each in costs),
        sync_s=sum(each.sync_s for each in costs),
        publish_s=publish_s,
        total_s=max(each.total_s for each in costs) + publish_s,
        stall_s=max(each.stall_s for each in costs),
        peak_ring_bytes=max(each.peak_ring_bytes for each in costs),
    )


def _parents(entry: FileEntry) -> Iterable[str]:
    parts = entry.path.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))
