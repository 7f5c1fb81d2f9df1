"""How the ranks of a job publish a tag together, once it has been opened.

Where all ranks share a root that is one question: each says which files it has made
durable, rank 0 publishes them and tells everyone the same report. Where nodes have
disks of their own (several *places*), those publish first and rank 0 last: its rename
is the commit point, and what the others showed is taken back if it fails.
"""

__all__ = ["Agreement", "Share"]

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from time import perf_counter

import msgspec

from aiockpt.catalog import Catalog
from aiockpt.errors import CheckpointError, InvalidArgumentError, PeerError
from aiockpt.events import CommitReport
from aiockpt.manifest import FileEntry, Manifest
from aiockpt.opening import Place, TagOptions
from aiockpt.ranks.base import Ranks
from aiockpt.threads import finish, outlast, run_blocking

_logger = logging.getLogger(__name__)

_encode = msgspec.json.encode


class Share(msgspec.Struct, frozen=True):
    """What one rank brings to a commit.

    Attributes:
        files: Its files, durable.
        costs: Its own part of the report.
    """

    files: tuple[FileEntry, ...]
    costs: CommitReport


class _Verdict(msgspec.Struct, frozen=True):
    """Of rank 0: what was published; or nothing, as there is nothing, or not yet."""

    report: CommitReport | None
    is_empty: bool = False


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
        self._number = 0

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

    async def publish(self, share: Share, number: int = 0) -> CommitReport | None:
        """Publishes the files of all ranks, once every rank has called this.

        Args:
            share: What this rank brings.
            number: See `Catalog.publish`.

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
        self._number = number
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
            number=self._number,
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
