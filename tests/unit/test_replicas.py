"""`aiockpt.replicas`: several ranks, on one loop, write one file together."""

import asyncio
import contextlib
import errno
import itertools
import os
import threading
import unittest.mock
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiockpt.capture import capture
from aiockpt.errors import (
    CheckpointError,
    InvalidArgumentError,
    PeerError,
    StorageError,
    TornSnapshotError,
)
from aiockpt.events import Event, Written
from aiockpt.file_save import FileSave
from aiockpt.guard import StagingGate
from aiockpt.image import Chunk
from aiockpt.replicas import ReplicaSaver, group_of
from aiockpt.ring import Lease, Ring
from aiockpt.saver import Saver
from aiockpt.staging.base import Source
from aiockpt.staging.host import HostStager
from aiockpt.storage import local_write
from aiockpt.storage.local import LocalStorage
from aiockpt.testing.strategies import state_dicts
from aiockpt.threads import WorkerPool
from gates import LIMIT_S, cancelled_at, turns
from meetings import Job
from states import ALL_STATES

PAGE = 4096
# Of the smallest ring, so that small states have many chunks.
CHUNK_BYTES = PAGE
TARGET = "model.pt"


class Team:
    """The ranks of a job, each with an engine's parts of its own, in one directory.

    Attributes:
        job: The job.
        savers: What saves files on each rank.
        events: What each rank was told.
        given_up: Ranks whose attempt has failed meanwhile.
        noted: What went wrong on each rank, as it was told.
    """

    def __init__(
        self, stack: contextlib.ExitStack, root: Path, chunk_sizes: Sequence[int]
    ) -> None:
        self.job = Job(len(chunk_sizes))
        self.given_up: set[int] = set()
        self.noted: list[list[Exception]] = [[] for _ in chunk_sizes]
        self.events: list[list[Event]] = [[] for _ in chunk_sizes]
        self.savers = [
            self._saver(stack, root, chunk_bytes, emit.append)
            for chunk_bytes, emit in zip(chunk_sizes, self.events, strict=True)
        ]

    def _saver(
        self,
        stack: contextlib.ExitStack,
        root: Path,
        chunk_bytes: int,
        emit: Callable[[Event], None],
    ) -> Saver:
        ring = Ring(8 * chunk_bytes)
        stack.callback(ring.close)
        gate = StagingGate(is_holding=True)
        stack.callback(gate.close)
        names = {"plan": 2, "copy": 1, "worker": 2}
        pools = {name: WorkerPool(num, name) for name, num in names.items()}
        for pool in pools.values():
            stack.callback(pool.shutdown)
        return Saver(
            ring=ring,
            stager=HostStager(pools["copy"]),
            storage=LocalStorage(str(root), pools["worker"]),
            gate=gate,
            planners=pools["plan"],
            clerks=pools["plan"],
            copiers=pools["copy"],
            emit=emit,
        )

    def replace(self, rank: int, **parts: object) -> None:
        """Gives one rank other parts."""
        for name, part in parts.items():
            object.__setattr__(self.savers[rank], name, part)

    async def save(
        self,
        saves: Sequence[FileSave],
        group: Sequence[int] | None = None,
        target: str = TARGET,
    ) -> list[BaseException | None]:
        """Saves on every member at once; what each of them raised."""
        members = group if group is not None else range(len(self.savers))
        tasks = [
            asyncio.create_task(self.save_on(rank, save, members, target))
            for rank, save in zip(members, saves, strict=True)
        ]
        _, stuck = await asyncio.wait(tasks, timeout=LIMIT_S)
        assert not stuck, f"a rank waits for ever: {self.job.log}"
        assert not any(saver.ring.leased_bytes for saver in self.savers)
        return [error_of(task) for task in tasks]

    async def save_on(
        self,
        rank: int,
        save: FileSave,
        group: Sequence[int] | None = None,
        target: str = TARGET,
    ) -> None:
        try:
            await self.together(rank, group).run(save, target)
        finally:
            await self.savers[rank].release(save)

    def together(self, rank: int, group: Sequence[int] | None = None) -> ReplicaSaver:
        return ReplicaSaver(
            saver=self.savers[rank],
            ranks=self.job.ranks[rank],
            group=group if group is not None else range(len(self.savers)),
            topic="attempt",
            has_failed=lambda: rank in self.given_up,
            note=self.noted[rank].append,
        )


def error_of(task: "asyncio.Task[None]") -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


@contextlib.contextmanager
def team_in(root: Path, *chunk_sizes: int) -> Iterator[Team]:
    with contextlib.ExitStack() as stack:
        yield Team(stack, root, chunk_sizes)


@pytest.fixture
def make_team(tmp_path: Path) -> Iterator[Callable[..., Team]]:
    """Makes teams of as many ranks as it is given lengths of chunks."""
    # Ended here, where no loop runs: threads are joined.
    with contextlib.ExitStack() as stack:
        yield lambda *sizes: stack.enter_context(team_in(tmp_path, *sizes))


@pytest.fixture
def team(make_team: Callable[..., Team]) -> Team:
    """Three ranks."""
    return make_team(*[CHUNK_BYTES] * 3)


def saves_of(state: object, num: int, path: str = TARGET) -> list[FileSave]:
    """A replica of one state for each of `num` ranks."""
    return [FileSave("tag", path, capture(state)) for _ in range(num)]


def state_of_chunks(num_chunks: int) -> dict[str, torch.Tensor]:
    """A few tensors with as many bytes."""
    numbers = torch.arange(num_chunks * CHUNK_BYTES // 8 - 400)
    third = len(numbers) // 3
    parts = numbers[:third], numbers[third : third + 7], numbers[third + 7 :]
    return {f"part{index}": part.clone() for index, part in enumerate(parts)}


async def one_rank_saves(team: Team, state: object, path: str = TARGET) -> bytes:
    """The file as one rank makes it."""
    saver = team.savers[0]
    (save,) = saves_of(state, 1, path)
    await saver.run(save, f"alone-{path}", 0)
    await saver.release(save)
    assert save.entry is not None
    data = taken_from(team, f"alone-{path}")
    assert save.entry.crc32 == zlib.crc32(data)
    return data


def taken_from(team: Team, path: str) -> bytes:
    """What a file of the team holds; the file is removed."""
    file = Path(team.savers[0].storage.root, path)
    data = file.read_bytes()
    file.unlink()
    return data


async def check_is_the_same_file(
    team: Team, state: object, path: str = TARGET, group: Sequence[int] | None = None
) -> None:
    """All members save a state; the file must be that of one rank, its CRC known."""
    expected = await one_rank_saves(team, state, path)
    members = group if group is not None else range(len(team.savers))
    saves = saves_of(state, len(members), path)
    errors = await team.save(saves, members, path)
    assert errors == [None] * len(members)
    assert taken_from(team, path) == expected
    assert {save.entry for save in saves} == {saves[0].entry}
    entry = saves[0].entry
    assert entry is not None
    assert (entry.path, entry.nbytes) == (path, len(expected))
    assert (entry.crc32, entry.rank) == (zlib.crc32(expected), members[0])
    assert sum(save.progress.written_bytes for save in saves) == len(expected)
    for save in saves:
        assert save.progress.staged_bytes == save.progress.planned_bytes
        assert save.progress.written_bytes == save.progress.planned_bytes
        assert save.capture is None
    assert not team.job.unfinished


# --- the file -------------------------------------------------------------------------


@pytest.mark.parametrize("num_members", range(1, 6))
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5, 12, 40])
async def test_the_file_is_byte_for_byte_that_of_one_rank(
    num_chunks, num_members, make_team
):
    team = make_team(*[CHUNK_BYTES] * num_members)
    await check_is_the_same_file(team, state_of_chunks(num_chunks))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=state_dicts(), num_members=st.integers(2, 5), filler=st.integers(0, 3000))
def test_whatever_the_state_the_file_is_that_of_one_rank(
    state, num_members, filler, tmp_path
):
    # The filler moves the boundaries of the parts over everything else.
    padded = {"filler": torch.arange(filler), "state": state}
    with team_in(tmp_path, *[CHUNK_BYTES] * num_members) as team:
        asyncio.run(check_is_the_same_file(team, padded))


@pytest.mark.parametrize("name", sorted(ALL_STATES))
async def test_every_kind_of_state_is_saved_by_replicas(name, team):
    await check_is_the_same_file(team, ALL_STATES[name]())


@pytest.mark.parametrize("num_members", [2, 3, 5])
@pytest.mark.parametrize("num_numbers", [0, 1, 1000, 20_000])
async def test_safetensors_are_saved_by_replicas(num_numbers, num_members, make_team):
    state = {"a": torch.arange(num_numbers), "b": torch.ones(3, dtype=torch.bfloat16)}
    team = make_team(*[CHUNK_BYTES] * num_members)
    await check_is_the_same_file(team, state, "model.safetensors")


@pytest.mark.parametrize("num_members", [2, 4])
async def test_ten_thousand_small_tensors_are_saved_by_replicas(num_members, make_team):
    state = {str(number): torch.full((3,), number) for number in range(10_000)}
    team = make_team(*[64 * PAGE] * num_members)
    await check_is_the_same_file(team, state)


async def test_rings_of_other_chunk_sizes_make_the_same_file(make_team):
    team = make_team(4 * PAGE, PAGE, 2 * PAGE)
    await check_is_the_same_file(team, state_of_chunks(30))


@pytest.mark.parametrize("group", [(1, 3), (0, 2, 3), (2, 0), (3,)])
async def test_a_group_of_some_ranks_saves_without_the_others(group, make_team):
    team = make_team(*[CHUNK_BYTES] * 4)
    await check_is_the_same_file(team, state_of_chunks(9), group=group)
    assert {rank for rank, _, _ in team.job.log} == set(group)


async def test_many_files_are_saved_at_once_with_rings_smaller_than_any(team):
    states = [state_of_chunks(20 + index) for index in range(6)]
    expected = [await one_rank_saves(team, state) for state in states]
    paths = [f"{index}.pt" for index in range(6)]
    # Each rank begins with another file: no ring may wait for another rank's.
    async with asyncio.TaskGroup() as group:
        for rank in range(3):
            for index in [*range(2 * rank, 6), *range(2 * rank)]:
                (save,) = saves_of(states[index], 1, paths[index])
                group.create_task(team.save_on(rank, save, target=paths[index]))
    assert [taken_from(team, path) for path in paths] == expected


async def test_each_rank_writes_only_its_own_run_of_chunks(team, monkeypatch):
    written: dict[int, list[int]] = {}
    write = local_write.LocalWriteFile._write

    def note(self, offset, view, prepare):
        written.setdefault(id(self._workers), []).append(offset // CHUNK_BYTES)
        write(self, offset, view, prepare)

    monkeypatch.setattr(local_write.LocalWriteFile, "_write", note)
    saves = saves_of(state_of_chunks(12), 3)
    assert await team.save(saves) == [None] * 3
    num_chunks = -(-saves[0].entry.nbytes // CHUNK_BYTES)
    runs = [sorted(run) for run in written.values()]
    assert sorted(itertools.chain(*runs)) == list(range(num_chunks))
    assert len(runs) == 3
    assert all(run == list(range(run[0], run[-1] + 1)) for run in runs)


async def test_observers_are_told_the_checksum_of_the_whole_file(team):
    saves = saves_of(state_of_chunks(12), 3)
    assert await team.save(saves) == [None] * 3
    written = [
        event for events in team.events for event in events if type(event) is Written
    ]
    assert {event.crc32 for event in written} == {saves[0].entry.crc32}
    assert sum(event.nbytes for event in written) == saves[0].entry.nbytes


async def test_a_rank_is_staged_whatever_the_others_are_at(team):
    """The second rank stages while the others cannot even begin to."""
    may_stage = asyncio.Event()

    class WaitingStager(HostStager):
        async def fill(
            self, lease: Lease, chunk: Chunk, sources: Sequence[Source]
        ) -> None:
            await may_stage.wait()
            await super().fill(lease, chunk, sources)

    for rank in (0, 2):
        team.replace(rank, stager=WaitingStager(team.savers[rank].copiers))
    saves = saves_of(state_of_chunks(12), 3)
    task = asyncio.create_task(team.save(saves))
    await saves[1].staged.wait()
    assert saves[1].capture is None
    assert not saves[0].staged.is_set()
    may_stage.set()
    assert await task == [None] * 3


async def test_a_rank_with_nothing_to_write_is_staged_before_the_others_have_written(
    team, monkeypatch
):
    may_write = threading.Event()
    write = local_write.LocalWriteFile._write

    def wait_and_write(self, *args):
        assert may_write.wait(LIMIT_S)
        write(self, *args)

    monkeypatch.setattr(local_write.LocalWriteFile, "_write", wait_and_write)
    saves = saves_of({"a": torch.ones(3)}, 3)
    task = asyncio.create_task(team.save(saves))
    for save in saves:
        await save.staged.wait()
        assert save.capture is None
    assert not task.done()
    may_write.set()
    assert await task == [None] * 3
    assert [save.progress.written_bytes > 0 for save in saves] == [True, False, False]


async def test_a_rank_with_nothing_to_write_tells_that_its_state_has_changed(team):
    changing = {"a": torch.ones(3)}
    saves = [*saves_of({"a": torch.ones(3)}, 2), *saves_of(changing, 1)]
    changing["a"].add_(1)
    fails_on(2, await team.save(saves), TornSnapshotError)


async def test_no_rank_has_a_lease_while_it_waits_for_another(team):
    leased: list[int] = []

    async def look(rank: int, _call: str, _topic: str) -> None:
        leased.append(team.savers[rank].ring.leased_bytes)

    team.job.on_call = look
    assert await team.save(saves_of(state_of_chunks(30), 3)) == [None] * 3
    assert leased == [0] * 6


# --- differences ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda state: state.update(step=8), "other values"),
        (lambda state: state.update(part1=torch.zeros(1)), "sizes of tensors"),
        (lambda state: state.update(part1=state["part0"]), "sizes of tensors"),
        (lambda state: state.update(part2=state["part2"].double()), "other values"),
    ],
)
async def test_other_state_on_one_rank_is_refused_on_all_and_named(
    change, where, team, tmp_path
):
    state = state_of_chunks(6) | {"step": 7}
    other = dict(state)
    change(other)
    saves = [*saves_of(state, 2), *saves_of(other, 1)]
    for error in await team.save(saves):
        assert isinstance(error, InvalidArgumentError)
        assert f"differs between ranks 0 and 2 in its {where}" in str(error)
        assert "tag/model.pt" in str(error)
    assert os.listdir(tmp_path) == []


async def test_a_rank_without_the_shared_directory_is_told_of_on_all(team, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    workers = team.savers[1].storage._workers
    team.replace(1, storage=LocalStorage(str(elsewhere), workers))
    errors = await team.save(saves_of(state_of_chunks(6), 3))
    assert isinstance(errors[1], InvalidArgumentError)
    for error in (errors[0], errors[2]):
        assert isinstance(error, PeerError)
        assert error.rank == 1
    for error in errors:
        assert "rank 1 does not see the file that rank 0 has made" in str(error)


# --- groups ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicated", "group"),
    [
        (True, (0, 1, 2, 3)),
        (False, ()),
        ([2, 0], (0, 2)),
        ({2, 3}, (2, 3)),
        (torch.tensor([2, 3]), (2, 3)),
        ([2], ()),
        ([2, 2], ()),
        (range(4), (0, 1, 2, 3)),
    ],
)
def test_a_group_is_all_ranks_or_some_in_any_order(replicated, group):
    assert group_of(Job(4).ranks[2], replicated=replicated) == group


@pytest.mark.parametrize(
    "replicated",
    [[0, 1], [], [2, 4], [2, -1], 2, None, "2", ["2"], [2, 0.5], [2, None]],
)
def test_what_is_no_group_of_this_rank_is_refused(replicated):
    with pytest.raises(InvalidArgumentError, match="replicated: "):
        group_of(Job(4).ranks[2], replicated=replicated)


def test_a_job_of_one_rank_shares_nothing():
    assert group_of(Job(1).ranks[0], replicated=True) == ()
    assert group_of(Job(1).ranks[0], replicated=[0]) == ()


# --- failures -------------------------------------------------------------------------


def fails_on(rank: int, errors: Sequence[BaseException | None], kind: type) -> None:
    """One rank raised its own error, and the others know whose it was."""
    assert isinstance(errors[rank], kind), errors
    for other, error in enumerate(errors):
        if other != rank:
            assert isinstance(error, PeerError), errors
            assert error.rank == rank


@pytest.mark.parametrize("rank", range(3))
async def test_state_that_cannot_be_saved_on_one_rank_fails_it_on_all(rank, team):
    saves = saves_of(state_of_chunks(6), 3, "a.safetensors")
    nested = {"a": {"b": torch.ones(1)}}
    saves[rank] = saves_of(nested, 1, "a.safetensors")[0]
    errors = await team.save(saves)
    fails_on(rank, errors, InvalidArgumentError)
    assert {error.phase for error in errors if isinstance(error, PeerError)} == {"plan"}


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("nth", [0, 2, 3])
async def test_a_disk_that_fails_on_one_rank_fails_it_on_all(
    rank, nth, team, monkeypatch
):
    write = local_write.LocalWriteFile._write
    mine = team.savers[rank].storage._workers
    num_writes = itertools.count()

    def fail(self, offset, view, prepare):
        if self._workers is mine and next(num_writes) == nth:
            raise StorageError(errno.EIO, "broken", "disk")
        write(self, offset, view, prepare)

    monkeypatch.setattr(local_write.LocalWriteFile, "_write", fail)
    errors = await team.save(saves_of(state_of_chunks(12), 3))
    fails_on(rank, errors, StorageError)
    assert {error.phase for error in errors if isinstance(error, PeerError)} <= {
        "stage",
        "write",
    }
    assert team.noted[rank] == [errors[rank]]
    assert not team.job.unfinished


@pytest.mark.parametrize("rank", range(3))
async def test_a_tensor_that_is_changed_on_one_rank_fails_it_on_all(rank, team):
    state = state_of_chunks(12)
    saves = saves_of(state, 2)
    changing = state_of_chunks(12)
    saves.insert(rank, saves_of(changing, 1)[0])
    changing["part1"].add_(1)
    errors = await team.save(saves)
    fails_on(rank, errors, TornSnapshotError)
    assert {error.phase for error in errors if isinstance(error, PeerError)} == {
        "stage"
    }


async def test_a_file_that_cannot_be_made_fails_on_all(team, tmp_path):
    (tmp_path / TARGET).write_bytes(b"taken")
    for error in await team.save(saves_of(state_of_chunks(6), 3)):
        assert isinstance(error, PeerError)
        assert error.rank == 0
        assert "File exists" in str(error)
    (noted,) = team.noted[0]
    assert isinstance(noted, StorageError)
    assert team.noted[1:] == [[], []]
    assert (tmp_path / TARGET).read_bytes() == b"taken"


@pytest.mark.parametrize(
    ("name", "rank"), [("_amend", 2), ("_sync", 0), ("_sync", 1), ("_sync", 2)]
)
async def test_a_disk_that_fails_at_the_end_fails_the_rank_that_has_it(
    name, rank, team, monkeypatch
):
    original = getattr(local_write.LocalWriteFile, name)
    mine = team.savers[rank].storage._workers

    def fail(self, *args):
        if self._workers is mine:
            raise StorageError(errno.EIO, "broken", "disk")
        original(self, *args)

    monkeypatch.setattr(local_write.LocalWriteFile, name, fail)
    saves = saves_of(state_of_chunks(12), 3)
    errors = await team.save(saves)
    # The commit, which waits for every rank's word, then fails on all.
    assert isinstance(errors[rank], StorageError)
    assert saves[rank].entry is None


async def test_a_seal_of_two_ranks_is_durable_before_the_save_ends(team, monkeypatch):
    calls: list[str] = []
    for name in ("_write", "_amend", "_sync"):
        original = getattr(local_write.LocalWriteFile, name)

        def note(self, *args, name=name, original=original):
            if self._workers is team.savers[2].storage._workers:
                calls.append(name)
            original(self, *args)

        monkeypatch.setattr(local_write.LocalWriteFile, name, note)
    assert await team.save(saves_of(state_of_chunks(12), 3)) == [None] * 3
    kinds = [name for name, _ in itertools.groupby(calls)]
    assert kinds == ["_write", "_amend", "_sync"]


@pytest.mark.parametrize("kind", ["differs", "broken"])
async def test_a_failure_that_is_kept_keeps_no_tensor(kind, team, monkeypatch):
    array = np.arange(CHUNK_BYTES)
    is_alive = weakref.ref(array)
    state = {"numbers": torch.from_numpy(array)}
    saves = saves_of(state, 3)
    if kind == "differs":
        saves[1] = saves_of({"numbers": torch.arange(1)}, 1)[0]
    else:
        error = StorageError(errno.EIO, "broken", "disk")
        failing = unittest.mock.Mock(side_effect=error)
        monkeypatch.setattr(local_write.LocalWriteFile, "_write", failing)
    del state, array
    errors = await team.save(saves)
    assert all(errors)
    assert is_alive() is None


@pytest.mark.parametrize("rank", range(3))
async def test_a_rank_that_refuses_keeps_none_waiting_for_it(rank, team):
    saves = saves_of(state_of_chunks(6), 3)
    tasks = [
        asyncio.create_task(team.save_on(other, saves[other]))
        for other in range(3)
        if other != rank
    ]
    await team.together(rank).refuse(TARGET, StorageError(errno.EIO, "broken", "disk"))
    await asyncio.wait(tasks)
    for task in tasks:
        error = error_of(task)
        assert isinstance(error, PeerError)
        assert (error.rank, error.phase) == (rank, "plan")
        assert "broken" in str(error)


# --- cancelling -----------------------------------------------------------------------


@pytest.mark.parametrize("rank", range(3))
def test_wherever_one_rank_is_cancelled_nobody_waits_for_ever(rank, tmp_path):
    state = state_of_chunks(12)
    for num_suspensions in itertools.count(1):
        with team_in(tmp_path, *[CHUNK_BYTES] * 3) as team:
            came = asyncio.run(cancelled_on(team, rank, state, num_suspensions))
        (tmp_path / TARGET).unlink(missing_ok=True)
        if not came:
            break
    assert num_suspensions > 10


@pytest.mark.parametrize("rank", range(3))
async def test_who_gives_up_while_the_file_is_made_goes_no_further(
    rank, team, monkeypatch
):
    storage = team.savers[0].storage
    create = storage.create
    making, may_go_on = asyncio.Event(), asyncio.Event()

    async def wait_and_create(path: str, nbytes: int) -> object:
        making.set()
        await may_go_on.wait()
        return await create(path, nbytes)

    monkeypatch.setattr(storage, "create", wait_and_create)
    saves = saves_of(state_of_chunks(12), 3)
    tasks = [asyncio.create_task(team.save_on(r, saves[r])) for r in range(3)]
    await making.wait()
    # Too late: the meeting drops the cancellation, as those of real ranks do.
    team.given_up.add(rank)
    tasks[rank].cancel()
    await turns()
    may_go_on.set()
    await asyncio.wait(tasks)
    fails_on(rank, [error_of(task) for task in tasks], CheckpointError)


async def cancelled_on(team: Team, rank: int, state: object, at: int) -> bool:
    """Cancels one rank at a suspension; whether it came so far."""
    saves = saves_of(state, 3)
    tasks = {
        other: asyncio.create_task(team.save_on(other, saves[other]))
        for other in range(3)
        if other != rank
    }
    came = await cancelled_at(at, team.save_on(rank, saves[rank]))
    _, stuck = await asyncio.wait(tasks.values(), timeout=LIMIT_S)
    assert not stuck, f"a rank waits for ever: {team.job.log}"
    errors = {type(error_of(task)) for task in tasks.values()}
    # One outcome for both, whatever it is.
    assert errors in ({type(None)}, {PeerError})
    assert not team.job.unfinished
    return came
