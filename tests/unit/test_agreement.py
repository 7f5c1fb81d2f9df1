"""How ranks open and publish a tag together: `aiockpt.agreement`, with `Attempt`.

The ranks are members of a real hub, on one loop, in one root or in a root each.
"""

import asyncio
import contextlib
import errno
import functools
import itertools
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aiockpt.agreement import Agreement
from aiockpt.attempt import Attempt, Means
from aiockpt.catalog import Catalog
from aiockpt.errors import (
    CheckpointNotFoundError,
    EngineStateError,
    InvalidArgumentError,
    PeerError,
    StorageError,
)
from aiockpt.events import Event, Failed, Published
from aiockpt.file_save import FileSave
from aiockpt.manifest import FileEntry
from aiockpt.opening import TagOptions, open_place
from aiockpt.ranks.failures import lost
from aiockpt.ranks.hub import Hub
from aiockpt.ranks.single import SingleRank
from aiockpt.storage.local import LocalStorage
from aiockpt.tag_loader import TagLoader
from aiockpt.testing.roots import assert_root_consistent
from aiockpt.threads import WorkerPool, run_blocking
from gates import LIMIT_S, cancelled_at, failing, held
from ranks.stars import outcomes, settled, star

PLAIN = TagOptions()
OVERWRITE = TagOptions(is_overwrite=True)


class OneRank:
    """What an engine has of a rank, without its threads' machinery."""

    def __init__(self, root: Path, ranks: Any, planners: WorkerPool) -> None:
        self.root = root
        self.ranks = ranks
        self.planners = planners
        self.catalog = Catalog(LocalStorage(str(root), planners))
        self.events: list[Event] = []

    async def create(self, tag: str = "a", options: TagOptions = PLAIN) -> Attempt:
        parts = self.ranks, self.catalog, self.planners, tag
        agreement = Agreement(*parts, await open_place(*parts, options), options)
        saver: Any = SimpleNamespace(ring=SimpleNamespace(peak_bytes=0))
        means = Means(
            saver, self.catalog, self.ranks, self.planners, self.events.append
        )
        return Attempt(means, tag, agreement)

    async def save(self, attempt: Attempt, path: str = "") -> None:
        """Adds a file that is durable already."""
        data = b"data"
        path = path or f"dir/{self.ranks.rank}.pt"
        save = FileSave(attempt.tag, path, None)
        save.entry = FileEntry(
            path=save.path,
            nbytes=len(data),
            crc32=zlib.crc32(data),
            rank=self.ranks.rank,
        )
        target = self.root / attempt._directory / save.path

        def write() -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

        await self.blocking(write)
        attempt.add(save, save.written.set)

    async def open(self, tag: str = "a", options: TagOptions = PLAIN) -> Attempt:
        """An attempt with a file."""
        attempt = await self.create(tag, options)
        await self.save(attempt)
        return attempt

    async def blocking(self, work: Callable[..., Any], *args: object) -> Any:
        return await run_blocking(self.planners, work, *args)

    async def tags(self) -> list[str]:
        return [info.tag for info in await self.blocking(self.catalog.tags)]


class Crew(list[OneRank]):
    """All ranks of a job."""

    async def each(self, call: Callable[[OneRank], Awaitable[Any]]) -> list[Any]:
        """What `call` returned or raised on every rank; nobody waits for ever."""
        async with asyncio.timeout(LIMIT_S):
            return await outcomes([call(rank) for rank in self])

    async def opened(self, **options: Any) -> list[Attempt]:
        return await self.each(lambda rank: rank.open(**options))

    async def commit(self, attempts: Sequence[Attempt]) -> list[Any]:
        """The report or failure of every rank."""
        async with asyncio.timeout(LIMIT_S):
            await outcomes([attempt.commit() for attempt in attempts])
        return [attempt.report or attempt.failure for attempt in attempts]

    async def retry(self) -> None:
        """The tag, once more: it works and is whole."""
        attempts = await self.opened(options=OVERWRITE)
        reports = await self.commit(attempts)
        assert reports[0].num_files == len(self)
        assert all(report == reports[0] for report in reports), reports
        for attempt in attempts:
            if attempt.is_publisher:
                # As an engine does: what the tag has replaced goes.
                await attempt.discard_files()


@contextlib.asynccontextmanager
async def crew(roots: Sequence[Path], planners: WorkerPool) -> AsyncIterator[Crew]:
    async with star(len(roots), LIMIT_S) as job:
        ranks = Crew(
            OneRank(root, member, planners)
            for root, member in zip(roots, job.members, strict=True)
        )
        try:
            yield ranks
        finally:
            for rank in ranks:
                await rank.blocking(rank.catalog.close_work)
            for root in set(roots):
                check = functools.partial(assert_root_consistent, root, is_swept=True)
                await run_blocking(planners, check)


def no_others(errors: Sequence[Any]) -> Any:
    """What all raised alike."""
    told = {(type(e), getattr(e, "rank", 0), getattr(e, "phase", 0)) for e in errors}
    assert len(told) == 1, errors
    return errors[0]


@pytest.fixture
def planners() -> Iterator[WorkerPool]:
    pool = WorkerPool(6, "test-plan")
    yield pool
    pool.shutdown()


@pytest.fixture(params=["one root", "a root each"])
def roots(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    names = ["r"] * 3 if request.param == "one root" else ["r0", "r1", "r2"]
    return [tmp_path / name for name in names]


def loading_by(load: Callable[..., Awaitable[str]], ranks: Crew) -> list[TagLoader]:
    """What chooses the tags of each rank's loads, which `load` then does."""
    loader: Any = SimpleNamespace(load=load)
    return [
        TagLoader(rank.catalog, loader, rank.ranks, rank.planners) for rank in ranks
    ]


def waits_for_1(hub: Hub, topic: str) -> bool:
    opening = hub._open.get((topic, None), [])
    return any(each.missing() == [1] for each in opening)


async def create_cancelled_at(at: int, ranks: Crew) -> tuple[bool, list[Any]]:
    """Cancels rank 1's `create` at a suspension; whether it came so far, and what came
    of all three. Where it was as if not called, it is called again.
    """
    hub = ranks[0].ranks._door._star.server.hub
    others = [asyncio.create_task(rank.create()) for rank in (ranks[0], ranks[2])]
    made: list[Attempt | BaseException] = []

    async def create() -> None:
        made.append(await ranks[1].create())

    was_cancelled = await cancelled_at(at, create())
    if not made:
        # Rank 0 had not decided and waits for this rank; or the others are being told.
        await settled(
            lambda: waits_for_1(hub, "create a") or all(each.done() for each in others)
        )
        if waits_for_1(hub, "create a"):
            made += await outcomes([ranks[1].create()])
        else:
            made.append(asyncio.CancelledError())
    zero, two = await outcomes(others)
    return was_cancelled, [zero, made[0], two]


async def test_a_create_that_is_cancelled_leaves_the_tag_open_on_all_ranks_or_on_none(
    roots, planners
):
    async with crew(roots, planners) as ranks:
        num_failed = 0
        for at in itertools.count(1):
            async with asyncio.timeout(LIMIT_S):
                was_cancelled, results = await create_cancelled_at(at, ranks)
            if isinstance(results[1], Attempt):
                for rank, attempt in zip(ranks, results, strict=True):
                    await rank.save(attempt)
                assert [r.num_files for r in await ranks.commit(results)] == [3] * 3
                for rank in ranks:
                    await rank.blocking(rank.catalog.open_work)
                    with contextlib.suppress(CheckpointNotFoundError):
                        await rank.blocking(rank.catalog.delete, "a")
            else:
                num_failed += 1
                assert no_others([results[0], results[2]]).rank == 1
            if not was_cancelled:
                break
        assert num_failed > 0
        await ranks.retry()


async def test_a_cancelled_commit_is_as_if_not_called_and_the_others_go_on_waiting(
    roots, planners
):
    async with crew(roots, planners) as ranks:
        for at in itertools.count(1):
            attempts = await ranks.opened(options=OVERWRITE)
            others = [asyncio.create_task(attempts[rank].commit()) for rank in (0, 2)]
            was_cancelled = await cancelled_at(at, attempts[1].commit())
            await ranks.commit(attempts[1:2])
            await outcomes(others)
            reports = [attempt.report for attempt in attempts]
            assert all(report == reports[0] for report in reports)
            assert reports[0] is not None
            for rank in ranks:
                await rank.blocking(rank.catalog.discard, attempts[0]._directory)
            if not was_cancelled:
                break


@pytest.mark.parametrize("first", ["abort", "commit"])
@pytest.mark.parametrize("num_ranks", [1, 3])
async def test_a_commit_beside_an_abort_publishes_all_or_nothing(
    tmp_path, first, num_ranks, planners
):
    root = tmp_path / "runs"
    async with contextlib.AsyncExitStack() as stack:
        ranks = await stack.enter_async_context(crew([root] * num_ranks, planners))
        if num_ranks == 1:
            ranks[0].ranks = SingleRank()
        attempts = await ranks.opened()
        calls = [attempts[0].abort, attempts[0].commit]
        if first == "commit":
            calls.reverse()
        # In one turn of the loop, in this order.
        both = [asyncio.create_task(call()) for call in calls]
        others = [asyncio.create_task(attempt.commit()) for attempt in attempts[1:]]
        async with asyncio.timeout(LIMIT_S):
            await outcomes([*both, *others])
        is_published = attempts[0].report is not None
        assert all((each.report is not None) == is_published for each in attempts)
        assert not (is_published and num_ranks > 1)
        assert await ranks[0].tags() == (["a"] if is_published else [])
        for rank, attempt in zip(ranks, attempts, strict=True):
            kinds = [type(event) for event in rank.events]
            assert kinds.count(Failed) == (not is_published)
            assert kinds.count(Published) == is_published
            exists = rank.catalog._storage.exists
            assert not await rank.blocking(exists, attempt._directory)


async def test_an_abort_while_a_commit_waits_for_others_fails_both_once(
    tmp_path, planners
):
    async with crew([tmp_path / "runs"] * 2, planners) as ranks:
        attempts = await ranks.opened()
        committing = asyncio.create_task(attempts[1].commit())
        await settled(lambda: bool(ranks[1].ranks._consulting))
        await attempts[1].abort()
        await committing
        assert (await ranks.commit(attempts[:1]))[0].phase == "abort"
        assert [type(event) for event in ranks[1].events].count(Failed) == 1
        await ranks.retry()


async def test_tags_may_be_opened_and_published_in_any_order(roots, planners):
    async with crew(roots, planners) as ranks:
        tags = ["a", "b", "c"]

        async def work(rank: OneRank) -> list[int]:
            number = rank.ranks.rank
            mine = tags[number:] + tags[:number]
            attempts = await outcomes([rank.open(tag) for tag in mine])
            await outcomes([attempt.commit() for attempt in reversed(attempts)])
            return sorted(a.report.num_files for a in attempts)

        assert await ranks.each(work) == [[3, 3, 3]] * 3
        for rank in ranks:
            assert sorted(await rank.tags()) == tags


@pytest.mark.parametrize("name", ["open_work", "new_directory"])
async def test_an_opening_that_rank_0_cannot_make_fails_on_all(
    roots, name, monkeypatch, planners
):
    async with crew(roots, planners) as ranks:
        error = StorageError(errno.ENOSPC, "no room", "x")
        with monkeypatch.context() as patch:
            patch.setattr(ranks[0].catalog, name, failing(error))
            errors = await ranks.opened()
        assert no_others(errors).rank == 0
        await ranks.retry()


@pytest.mark.parametrize("name", ["join", "place"])
async def test_a_node_that_cannot_open_a_tag_fails_it_on_all(
    tmp_path, name, monkeypatch, planners
):
    roots = [tmp_path / "r0", tmp_path / "r1", tmp_path / "r2"]
    async with crew(roots, planners) as ranks:
        with monkeypatch.context() as patch:
            error = StorageError(errno.EROFS, "read-only", "x")
            patch.setattr(ranks[1].catalog, name, failing(error))
            results = await ranks.opened()
        told = no_others(results)
        assert (told.rank, told.phase) == (1, "create")
        # Where it happened, it is the cause.
        assert results[1].__cause__ is error
        assert await ranks.each(OneRank.tags) == [[]] * 3
        assert all(not rank.ranks._consulting for rank in ranks)
        await ranks.retry()


async def test_nothing_of_a_failed_opening_is_remembered(
    tmp_path, monkeypatch, planners
):
    roots = [tmp_path / "r0", tmp_path / "r1"]
    async with crew(roots, planners) as ranks:
        hub = ranks[0].ranks._door._star.server.hub
        with monkeypatch.context() as patch:
            error = StorageError(errno.EROFS, "read-only", "x")
            patch.setattr(ranks[1].catalog, "join", failing(error))
            await ranks.opened()
        await settled(lambda: hub.num_open == 0)


@pytest.mark.parametrize("name", ["join", "place"])
async def test_a_tag_that_cannot_be_opened_fails_no_other_that_is_being_opened(
    tmp_path, name, monkeypatch, planners
):
    roots = [tmp_path / "r0", tmp_path / "r1", tmp_path / "r2"]
    async with crew(roots, planners) as ranks:
        catalog = ranks[1].catalog
        with held(monkeypatch, catalog, name) as gate:
            opening = asyncio.create_task(ranks.opened(tag="a"))
            await ranks[1].blocking(gate.wait_reached)
            error = StorageError(errno.EROFS, "read-only", "x")
            monkeypatch.setattr(catalog, name, failing(error))
            results = await ranks.each(lambda rank: rank.create("b"))
        assert no_others(results).rank == 1
        reports = await ranks.commit(await opening)
        assert [report.num_files for report in reports] == [3] * 3


async def test_what_is_said_late_of_an_attempt_that_has_ended_fails_no_later_one(
    roots, planners
):
    async with crew(roots, planners) as ranks:
        attempts = await ranks.opened()
        # Both say that it failed; the other ranks wait for one word only.
        await outcomes([attempts[1].abort(), attempts[1].abort()])
        for failure in (await ranks.commit(attempts))[::2]:
            assert (failure.rank, failure.phase) == (1, "abort")
        await ranks.retry()


# The files of a tag have one list, wherever they lie.
@pytest.mark.parametrize("path", ["a.pt", "a.pt/b.pt"])
async def test_files_of_two_places_that_cannot_stand_side_by_side_fail_on_all(
    tmp_path, path, planners
):
    async with crew([tmp_path / "r0", tmp_path / "r1"], planners) as ranks:
        attempts = await ranks.each(OneRank.create)
        await ranks[0].save(attempts[0], path)
        await ranks[1].save(attempts[1], "a.pt")
        for failure in await ranks.commit(attempts):
            assert isinstance(failure, InvalidArgumentError)
            assert "of rank 1" in str(failure)
            assert f"{path!r} of rank 0" in str(failure)
        assert await ranks.each(OneRank.tags) == [[]] * 2
        await ranks.retry()


async def test_what_cannot_be_removed_does_not_hide_why_a_tag_was_not_opened(
    tmp_path, monkeypatch, planners
):
    roots = [tmp_path / "r0", tmp_path / "r1"]
    async with crew(roots, planners) as ranks:
        with monkeypatch.context() as patch:
            error = StorageError(errno.EROFS, "read-only", "x")
            patch.setattr(ranks[1].catalog, "join", failing(error))
            patch.setattr(ranks[0].catalog, "discard", failing(error))
            results = await ranks.opened()
        assert isinstance(results[0], PeerError)


async def test_a_node_that_cannot_publish_takes_back_what_others_have_shown(
    roots, monkeypatch, planners
):
    if roots[0] == roots[1]:
        pytest.skip("one root has one publisher")
    async with crew(roots, planners) as ranks:
        attempts = await ranks.opened(options=TagOptions(adopts=True))
        error = StorageError(errno.EIO, "I/O error", "x")
        with monkeypatch.context() as patch:
            patch.setattr(ranks[0].catalog, "publish", failing(error))
            failures = await ranks.commit(attempts)
        assert no_others(failures).rank == 0
        assert await ranks.each(OneRank.tags) == [[]] * 3
        await ranks.retry()


async def test_what_comes_into_a_tag_that_is_taken_back_stays(
    tmp_path, monkeypatch, planners
):
    roots = [tmp_path / "r0", tmp_path / "r1"]
    directory = roots[1] / "a"
    directory.mkdir(parents=True)
    (directory / "early").write_bytes(b"1")
    async with crew(roots, planners) as ranks:
        attempts = await ranks.opened(options=TagOptions(adopts=True))

        def fail_late(*_args: object, **_kwargs: object) -> None:
            (directory / "late").write_bytes(b"2")
            raise StorageError(errno.EIO, "I/O error", "x")

        monkeypatch.setattr(ranks[0].catalog, "publish", fail_late)
        # Rank 1 shows its part before rank 0 tries.
        assert no_others(await ranks.commit(attempts)).rank == 0
        assert await ranks[1].tags() == []
    assert (directory / "early").read_bytes() == b"1"
    assert (directory / "late").read_bytes() == b"2"


def expire(ranks: Crew) -> None:
    """The time is over for whoever is deciding, and is still held to one."""
    hub = ranks[0].ranks._door._star.server.hub
    for instance in [each for open_ in hub._open.values() for each in open_]:
        assert instance.is_deciding
        if instance.timer is not None:
            hub._expire(instance)


def lose(ranks: Crew) -> None:
    """Rank 1 has lost rank 0, which does not notice."""
    ranks[1].ranks.lose(lost(0, "lost"))


@contextlib.contextmanager
def shown_and_held(
    monkeypatch: pytest.MonkeyPatch, catalog: Catalog
) -> Iterator[threading.Event]:
    """Set when the catalog has published; it returns from that after the block."""
    shown, may_return = threading.Event(), threading.Event()
    publish = catalog.publish

    def publish_late(*args: Any, **kwargs: Any) -> Any:
        manifest = publish(*args, **kwargs)
        shown.set()
        assert may_return.wait(LIMIT_S)
        return manifest

    monkeypatch.setattr(catalog, "publish", publish_late)
    try:
        yield shown
    finally:
        may_return.set()


async def test_a_rank_0_that_was_lost_is_asked_afterwards_what_it_did(
    tmp_path, monkeypatch, planners
):
    async with crew([tmp_path / "runs"] * 2, planners) as ranks:
        attempts = await ranks.opened()
        with shown_and_held(monkeypatch, ranks[0].catalog) as shown:
            late = asyncio.create_task(attempts[0].commit())
            other = asyncio.create_task(ranks.commit(attempts[1:]))
            await settled(shown.is_set)
            lose(ranks)
            (failure,) = await other
        await late
        assert (failure.rank, failure.phase) == (0, "lost")
        assert any("had published" in note for note in failure.__notes__)


ROOTS = {"one root": ["runs", "runs"], "a root each": ["r0", "r1"]}


@pytest.mark.parametrize("names", ROOTS.values(), ids=ROOTS)
async def test_a_rank_0_that_has_begun_to_show_the_tag_is_waited_for_by_all(
    tmp_path, monkeypatch, planners, names
):
    async with crew([tmp_path / name for name in names], planners) as ranks:
        attempts = await ranks.opened()
        with shown_and_held(monkeypatch, ranks[0].catalog) as shown:
            committing = asyncio.create_task(ranks.commit(attempts))
            await settled(shown.is_set)
            expire(ranks)
        one, other = await committing
        assert one == other
        assert one.num_files == 2
        assert await ranks.each(OneRank.tags) == [["a"]] * 2


@pytest.mark.parametrize("names", ROOTS.values(), ids=ROOTS)
async def test_a_rank_0_that_took_too_long_to_show_the_tag_shows_nothing_any_more(
    tmp_path, monkeypatch, planners, names
):
    async with crew([tmp_path / name for name in names], planners) as ranks:
        attempts = await ranks.opened()
        with held(monkeypatch, ranks[0].catalog, "publish") as gate:
            committing = asyncio.create_task(ranks.commit(attempts))
            await ranks[0].blocking(gate.wait_reached)
            expire(ranks)
        for failure in await committing:
            assert isinstance(failure, PeerError)
            assert (failure.rank, failure.phase) == (0, "decide")
        assert await ranks.each(OneRank.tags) == [[]] * 2


async def test_a_rank_that_refuses_twice_says_so_once(tmp_path, planners):
    async with crew([tmp_path / "runs"] * 2, planners) as ranks:
        attempts = await ranks.opened()
        refuse = attempts[0]._agreement.refuse
        told = await asyncio.gather(
            refuse(ValueError("first"), "plan"), refuse(ValueError("second"), "abort")
        )
        assert [(str(each), each.phase) for each in told] == [
            ("rank 0 failed in plan: ValueError: first", "plan")
        ] * 2
        (failure,) = await ranks.commit(attempts[1:])
        assert failure.phase == "plan"
        assert ranks[0].ranks._door._star.server.hub.num_open == 0


async def test_a_rank_that_loses_rank_0_takes_no_files_from_it(
    tmp_path, monkeypatch, planners
):
    async with crew([tmp_path / "runs"] * 2, planners) as ranks:
        attempts = await ranks.opened()
        with held(monkeypatch, ranks[0].catalog, "publish") as gate:
            late = asyncio.create_task(attempts[0].commit())
            other = asyncio.create_task(ranks.commit(attempts[1:]))
            await ranks[0].blocking(gate.wait_reached)
            lose(ranks)
            (failure,) = await other
            assert failure.rank == 0
        await late
        assert await ranks.each(OneRank.tags) == [["a"]] * 2
        root = tmp_path / "runs"
        assert [(root / f"a/dir/{n}.pt").read_bytes() for n in (0, 1)] == [b"data"] * 2


async def test_an_abort_of_rank_0_takes_no_files_while_it_publishes(
    tmp_path, monkeypatch, planners
):
    async with crew([tmp_path / "runs"] * 2, planners) as ranks:
        attempts = await ranks.opened()
        with held(monkeypatch, ranks[0].catalog, "publish") as gate:
            late = asyncio.create_task(attempts[0].commit())
            other = asyncio.create_task(ranks.commit(attempts[1:]))
            await ranks[0].blocking(gate.wait_reached)
            expire(ranks)
            await other
            aborting = asyncio.create_task(attempts[0].abort())
            # Until it waits for the commit: nothing else comes before that.
            await settled(lambda: attempts[0]._ending._waiters or aborting.done())
            directory = tmp_path / "runs" / attempts[0]._directory
            assert (directory / "dir/0.pt").exists()
        await late
        await aborting
        assert await ranks.each(OneRank.tags) == [[], []]


async def test_no_rank_of_a_node_takes_the_old_tag_from_its_publisher(
    tmp_path, monkeypatch, planners
):
    roots = [tmp_path / "r0", tmp_path / "r1", tmp_path / "r1"]
    async with crew(roots, planners) as ranks:
        await ranks.retry()
        old = (await ranks[1].blocking(ranks[1].catalog.manifest, "a")).attempt
        attempts = await ranks.opened(options=OVERWRITE)
        error = StorageError(errno.EIO, "I/O error", "x")
        publisher = ranks[attempts[1]._agreement.place.number]
        with (
            monkeypatch.context() as patch,
            held(patch, publisher.catalog, "retract") as gate,
        ):
            patch.setattr(ranks[0].catalog, "publish", failing(error))
            committing = asyncio.create_task(ranks.commit(attempts))
            await publisher.blocking(gate.wait_reached)
            # The others are done with it, and the old tag lies where the new one was.
            other = attempts[3 - ranks.index(publisher)]
            await settled(lambda: other.failure and not other._ending.locked())
            gate.open()
            failures = await committing
        assert no_others(failures).rank == 0
        found = await ranks[1].blocking(ranks[1].catalog.manifest, "a")
        assert found.attempt == old
        for name in ("dir/1.pt", "dir/2.pt"):
            assert (roots[1] / "a" / name).read_bytes() == b"data"
        await ranks.retry()


async def test_ranks_load_one_attempt_or_are_told_that_theirs_is_another(
    tmp_path, planners
):
    roots = [tmp_path / "r0", tmp_path / "r1"]
    async with crew(roots, planners) as ranks:
        await ranks.retry()
    # As if the nodes had lost rank 0 while they replaced the tag.
    async with crew(roots[1:], planners) as alone:
        await alone.retry()
    async with crew(roots, planners) as ranks:

        async def load(opener: Callable[[], Any], _: object) -> str:
            file, _ = await run_blocking(planners, opener)
            file.close()
            return "state"

        loaders = loading_by(load, ranks)
        options: Any = SimpleNamespace(into=None)
        found = await outcomes(
            loader.load(f"dir/{rank}.pt", None, options)
            for rank, loader in enumerate(loaders)
        )
        assert found[0] == "state"
        assert isinstance(found[1], CheckpointNotFoundError)
        assert "another save" in str(found[1])
        found = await outcomes(
            loader.load_latest_valid([f"dir/{rank}.pt"], options)
            for rank, loader in enumerate(loaders)
        )
        assert all(isinstance(each, CheckpointNotFoundError) for each in found), found


@pytest.mark.parametrize("num_files", [0, 1])
async def test_ranks_without_files_take_part(tmp_path, num_files, planners):
    async with crew([tmp_path / "runs"] * 3, planners) as ranks:
        attempts = await ranks.each(lambda rank: rank.create())
        for rank, attempt in list(zip(ranks, attempts, strict=True))[:num_files]:
            await rank.save(attempt)
        results = await outcomes([attempt.commit() for attempt in attempts])
        if num_files:
            assert [attempt.report.num_files for attempt in attempts] == [1] * 3
            return
        assert all(isinstance(each, EngineStateError) for each in results)
        # It stays open: with a file it can be committed.
        await ranks[1].save(attempts[1])
        assert (await ranks.commit(attempts))[0].num_files == 1


async def test_a_search_for_a_sound_tag_that_is_cancelled_fails_on_all(
    tmp_path, planners
):
    async with crew([tmp_path / "runs"] * 2, planners) as ranks:
        await ranks.retry()

        async def load(*_: object) -> str:
            await asyncio.sleep(0)
            return "state"

        loaders = loading_by(load, ranks)
        options: Any = SimpleNamespace(into=None)
        hub = ranks[0].ranks._door._star.server.hub
        for at in itertools.count(1):
            other = asyncio.create_task(
                loaders[0].load_latest_valid(["dir/0.pt"], options)
            )
            was_cancelled = await cancelled_at(
                at, loaders[1].load_latest_valid(["dir/1.pt"], options)
            )
            await settled(
                lambda search=other: waits_for_1(hub, "candidates") or search.done()
            )
            if not other.done():
                # It was withdrawn before any tag was looked at: as if not called.
                await loaders[1].load_latest_valid(["dir/1.pt"], options)
            async with asyncio.timeout(LIMIT_S):
                (result,) = await outcomes([other])
            assert result == ("a", ["state"]) or result.rank == 1
            if not was_cancelled:
                break
            # No word of a search is left for the next one.
            async with asyncio.timeout(LIMIT_S):
                again = await outcomes(
                    loader.load_latest_valid([f"dir/{rank}.pt"], options)
                    for rank, loader in enumerate(loaders)
                )
            assert again == [("a", ["state"])] * 2
