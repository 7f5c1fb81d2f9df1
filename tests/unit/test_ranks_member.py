"""`aiockpt.ranks.member.Member`: what `Ranks` promises, over sockets and in process."""

import asyncio
import gc
import weakref

import pytest

from aiockpt.errors import EngineStateError, InvalidArgumentError, PeerError
from aiockpt.ranks.messages import MAX_WORD_BYTES
from aiockpt.ranks.scoped import scoped
from gates import LIMIT_S
from ranks.stars import consult_all, joined, never, outcomes, settled, star

ALL = "0|1|2"


async def test_all_ranks_are_told_the_verdict_on_all_words():
    async with star(3) as job:
        for _ in range(3):
            assert await consult_all(job.members, "t") == [b"0|1|2"] * 3
        assert job.server.hub.num_open == 0


async def test_only_the_chair_decides():
    async with star(3) as job:
        calls = [
            job.members[0].consult("t", b"a", never, group=[2, 0]),
            job.members[2].consult("t", b"b", joined, group=[2, 0]),
        ]
        assert await asyncio.gather(*calls) == [b"b|a"] * 2


async def test_a_group_of_all_ranks_in_order_is_all_ranks():
    async with star(2) as job:
        calls = [
            job.members[0].consult("t", b"a", joined, group=[0, 1]),
            job.members[1].consult("t", b"b", never),
        ]
        assert await asyncio.gather(*calls) == [b"a|b"] * 2


@pytest.mark.parametrize("group", [[], [1, 2], [0, 0], [0, 3], [-1, 0]])
async def test_what_is_no_group_is_refused_before_anything_is_said(group):
    async with star(3) as job:
        with pytest.raises(InvalidArgumentError, match="no group of rank 0"):
            await job.members[0].consult("t", b"", never, group=group)
        with pytest.raises(InvalidArgumentError, match="no group of rank 0"):
            await job.members[0].object("t", OSError(), "stage", group=group)
        assert job.doors[0].num_connects == 0


async def test_the_nth_calls_belong_together():
    async with star(2) as job:
        await job.all_connected()
        early = [
            asyncio.ensure_future(job.members[1].consult("t", word, never))
            for word in (b"x", b"y", b"z")
        ]
        late = [await job.members[0].consult("t", b"%d" % n, joined) for n in range(3)]
        assert late == [b"0|x", b"1|y", b"2|z"]
        assert await asyncio.gather(*early) == late


@pytest.mark.parametrize("chair", [0, 1])
@pytest.mark.parametrize(
    "error", [InvalidArgumentError("bad tag"), EngineStateError("published already")]
)
async def test_what_decide_refuses_is_raised_everywhere_as_it_is(chair, error):
    async def refuse(words):
        raise error

    group = [chair, 1 - chair, 2]
    async with star(3) as job:
        raised = await outcomes(
            m.consult("t", b"", refuse, group=group) for m in job.members
        )
        assert [type(e) for e in raised] == [type(error)] * 3
        assert [str(e) for e in raised] == [str(error)] * 3
        assert raised[chair] is error
        assert len({id(e) for e in raised}) == 3


@pytest.mark.parametrize("chair", [0, 2])
async def test_what_else_goes_wrong_in_decide_is_a_peer_error_of_the_chair(chair):
    error = OSError("disk full")

    async def fail(words):
        raise error

    group = [chair, 1]
    async with star(3) as job:
        raised = await outcomes(
            job.members[rank].consult("t", b"", fail, group=group) for rank in group
        )
    for e in raised:
        assert isinstance(e, PeerError)
        assert str(e) == f"rank {chair} failed in commit: OSError: disk full"
        assert (e.rank, e.phase) == (chair, "commit")
    assert raised[0].__cause__ is error
    assert raised[1].__cause__ is None


async def test_a_peer_error_of_decide_passes_as_it_is():
    error = PeerError("rank 2 has another file", rank=2, phase="stage")

    async def fail(words):
        raise error

    async with star(2) as job:
        raised = await outcomes(m.consult("t", b"", fail) for m in job.members)
    assert raised[0] is error
    assert (str(raised[1]), raised[1].rank, raised[1].phase) == (
        "rank 2 has another file",
        2,
        "stage",
    )


@pytest.mark.parametrize("objector", [0, 1])
async def test_an_objection_fails_who_waits_and_who_comes_later(objector):
    error = OSError("disk full")
    async with star(4) as job:
        await job.all_connected()
        others = [m for m in job.members if m.rank != objector]
        waiting = [asyncio.ensure_future(m.consult("t", b"", never)) for m in others]
        del waiting[0:1], others[0:1]
        told = await job.members[objector].object("t", error, "write")
        raised = [told, *await outcomes(waiting), *await outcomes([])]
        for e in raised:
            assert isinstance(e, PeerError)
            assert str(e) == f"rank {objector} failed in write: OSError: disk full"
            assert (e.rank, e.phase) == (objector, "write")
        assert told.__cause__ is error
        assert all(e.__cause__ is None for e in raised[1:])
        await settled(lambda: job.server.hub.num_open == 0)


async def test_those_who_come_after_an_objection_are_told_at_once():
    async with star(3) as job:
        await job.all_connected()
        told = await job.members[1].object("t", OSError("no"), "write")
        for rank in (0, 2):
            with pytest.raises(PeerError, match="rank 1 failed in write: OSError: no"):
                await job.members[rank].consult("t", b"", never)
        assert isinstance(told, PeerError)
        assert await consult_all(job.members, "t") == [b"0|1|2"] * 3


async def test_the_first_of_two_objections_wins_on_all():
    async with star(3) as job:
        await job.all_connected()
        mine = OSError("second")
        first = await job.members[1].object("t", OSError("first"), "write")
        second = await job.members[0].object("t", mine, "stage")
        with pytest.raises(PeerError) as third:
            await job.members[2].consult("t", b"", never)
        for e in (first, second, third.value):
            assert str(e) == "rank 1 failed in write: OSError: first"
        assert second.__cause__ is None


@pytest.mark.parametrize("objector", [0, 1])
async def test_an_objection_stands_for_the_call_that_waits(objector):
    error = OSError("no")
    async with star(3) as job:
        await job.all_connected()
        member = job.members[objector]
        waiting = asyncio.ensure_future(member.consult("t", b"", never))
        await settled(lambda: job.server.hub.num_open)
        told = await member.object("t", error, "write")
        (raised,) = await outcomes([waiting])
        assert raised.__cause__ is told.__cause__ is error
        assert raised is not told
        others = [m for m in job.members if m.rank != objector]
        assert all(isinstance(e, PeerError) for e in await consult_all(others, "t"))
        assert await consult_all(job.members, "t") == [b"0|1|2"] * 3


@pytest.mark.parametrize("objector", [0, 1])
async def test_an_objection_that_is_too_late_says_so(objector):
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def decide(words):
        asked.set()
        await go_on.wait()
        return b"yes"

    async with star(2) as job:
        calls = [
            asyncio.ensure_future(m.consult("t", b"", decide)) for m in job.members
        ]
        await asked.wait()
        objection = asyncio.ensure_future(
            job.members[objector].object("t", OSError(), "write")
        )
        await job.members[1].consult("other", b"", joined, group=[1])
        go_on.set()
        assert await objection is None
        assert await asyncio.gather(*calls) == [b"yes"] * 2
        assert await consult_all(job.members, "t") == [b"0|1"] * 2


async def test_an_objection_while_a_call_is_being_withdrawn_is_not_lost():
    async with star(2) as job:
        await job.all_connected()
        member = job.members[1]
        waiting = asyncio.ensure_future(member.consult("t", b"", never))
        await settled(lambda: job.server.hub.num_open)
        waiting.cancel()
        told = await member.object("t", OSError("no"), "write")
        assert isinstance(told, PeerError)
        with pytest.raises(PeerError, match="rank 1 failed in write"):
            await job.members[0].consult("t", b"", never)
        assert waiting.cancelled()
        assert job.server.hub.num_open == 0


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_call_cancelled_before_all_came_is_as_if_it_was_not_made(rank):
    async with star(2) as job:
        await job.all_connected()
        call = asyncio.ensure_future(job.members[rank].consult("t", b"", never))
        await settled(lambda: job.server.hub.num_open)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert job.server.hub.num_open == 0
        assert await consult_all(job.members, "t") == [b"0|1"] * 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("chair", [0, 1])
async def test_a_cancellation_after_all_came_is_dropped(rank, chair):
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def decide(words):
        asked.set()
        await go_on.wait()
        return b"yes"

    group = [chair, 1 - chair]
    async with star(2) as job:
        calls = [
            asyncio.ensure_future(m.consult("t", b"", decide, group=group))
            for m in job.members
        ]
        await asked.wait()
        calls[rank].cancel()
        await asyncio.sleep(0)
        calls[rank].cancel()
        await consult_all(job.members[1:], "meanwhile", [1])
        go_on.set()
        assert await asyncio.gather(*calls) == [b"yes"] * 2
        assert calls[rank].cancelling() == 0


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_cancellation_at_any_moment_withdraws_or_is_dropped(rank):
    """The k-th turn of the loop, for every k until the call ends by itself."""
    async with star(2) as job:
        await job.all_connected()
        seen = set()
        for turn in range(200):
            calls = [
                asyncio.ensure_future(m.consult("t", b"%d" % m.rank, joined))
                for m in job.members
            ]
            for _ in range(turn):
                await asyncio.sleep(0)
            is_late = not calls[rank].cancel()
            raised = (await asyncio.wait([calls[rank]]))[0].pop()
            seen.add(raised.cancelled())
            if raised.cancelled():
                # The other's word still waits for it.
                again = await job.members[rank].consult("t", b"%d" % rank, joined)
                assert again == b"0|1"
            assert await calls[1 - rank] == b"0|1"
            assert job.server.hub.num_open == 0
            if is_late:
                break
        assert seen == {True, False}


async def test_a_timeout_around_a_call_that_is_too_late_does_not_expire():
    async def decide(words):
        timeout.reschedule(asyncio.get_running_loop().time())
        await settled(timeout.expired)
        return b"yes"

    async with star(2) as job:
        other = asyncio.ensure_future(job.members[1].consult("t", b"", never))
        async with asyncio.timeout(None) as timeout:
            assert await job.members[0].consult("t", b"", decide) == b"yes"
        assert await other == b"yes"


async def test_first_calls_at_the_same_time_connect_once():
    async with star(3) as job:
        calls = [m.consult(t, b"", joined) for t in "abc" for m in job.members]
        assert await asyncio.gather(*calls) == [b"||"] * 9
        assert [door.num_connects for door in job.doors] == [1, 1, 1]


async def test_a_failed_connect_is_told_and_can_be_tried_again():
    async with star(2) as job:
        port, job.server.port = job.server.port, 1
        with pytest.raises(PeerError, match="rank 0 could not be reached") as caught:
            await job.members[1].consult("t", b"", never)
        assert (caught.value.rank, caught.value.phase) == (0, "connect")
        assert isinstance(caught.value.__cause__, OSError)
        told = await job.members[1].object("t", OSError(), "stage")
        assert told.phase == "connect"
        job.server.port = port
        assert await consult_all(job.members, "t") == [b"0|1"] * 2


async def test_a_connect_cancelled_at_any_moment_can_be_tried_again():
    for turn in range(100):
        async with star(2) as job:
            call = asyncio.ensure_future(job.members[1].consult("t", b"1", never))
            for _ in range(turn):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            assert call.cancelled()
            assert await consult_all(job.members, "t") == [b"0|1"] * 2
            if job.doors[1].num_connects == 1 and turn > 2:
                break
    else:
        raise AssertionError("it never connected")


async def test_a_hub_that_does_not_answer_is_given_up():
    async with star(2) as job:
        await job.all_connected()
        job.members[1]._timeout_s = 0.02
        # As if it were stopped: its end is open, and nothing is read from it.
        (guest,) = job.server._guests
        guest._transport.pause_reading()
        with pytest.raises(
            PeerError, match=r"rank 0 said nothing for 0\.04 s"
        ) as caught:
            await job.members[1].consult("t", b"", never)
        assert (caught.value.rank, caught.value.phase) == (0, "lost")
        with pytest.raises(PeerError, match="said nothing"):
            await job.members[1].consult("t", b"", never)
        guest._transport.resume_reading()
        await settled(guest.ended.done)
        with pytest.raises(PeerError, match="rank 1 was lost"):
            await job.members[0].consult("u", b"", never)


async def test_who_does_not_come_in_time_is_named():
    async with star(3, timeout_s=0.02) as job:
        # It is the hub that gives up first, however late the hub comes to begin.
        job.members[0]._timeout_s = LIMIT_S
        raised = await consult_all(job.members[:1], "t")
        assert str(raised[0]) == "ranks 1-2 did not come to 't' within 0.02 s"
        assert (raised[0].rank, raised[0].phase) == (1, "late")


async def test_a_lost_member_fails_all_that_need_it_now_and_later():
    async with star(3) as job:
        await job.all_connected()
        waiting = [
            asyncio.ensure_future(m.consult("t", b"", never)) for m in job.members[:2]
        ]
        job.kill(2)
        for e in await outcomes(waiting) + await consult_all(job.members[:2], "u"):
            assert isinstance(e, PeerError)
            assert (e.rank, e.phase) == (2, "lost")
        assert await consult_all(job.members[:2], "u", [1, 0]) == [b"1|0"] * 2


async def test_without_the_hub_everything_fails_now_and_later():
    async with star(3) as job:
        await job.all_connected()
        waiting = [
            asyncio.ensure_future(m.consult("t", b"", never)) for m in job.members[1:]
        ]
        await settled(lambda: job.server.hub.num_open)
        job.kill(0)
        for e in await outcomes(waiting) + await consult_all(job.members[1:], "u"):
            assert isinstance(e, PeerError)
            assert (e.rank, e.phase) == (0, "lost")
        told = await job.members[1].object("t", OSError(), "stage")
        assert (told.rank, told.phase) == (0, "lost")


@pytest.mark.parametrize("rank", [0, 2])
async def test_whoever_closes_is_named_by_those_who_need_it(rank):
    async with star(3) as job:
        await job.all_connected()
        others = [m for m in job.members if m.rank != rank]
        waiting = [asyncio.ensure_future(m.consult("t", b"", never)) for m in others]
        await settled(lambda: job.server.hub.num_open)
        await job.members[rank].close()
        for e in await outcomes(waiting) + await consult_all(others, "u"):
            assert isinstance(e, PeerError)
            assert (e.rank, e.phase) == (rank, "closed")


async def test_the_hub_closes_as_soon_as_all_know(monkeypatch):
    monkeypatch.setattr("aiockpt.ranks.server._GOODBYE_S", 1000)
    monkeypatch.setattr("aiockpt.ranks.link._GOODBYE_S", 1000)
    async with star(3) as job:
        await job.all_connected()
        await job.members[1].close()
        await job.members[0].close()
        assert job.doors[2].connection.ended.done()


async def test_a_closed_member_says_so_to_all_its_calls():
    async with star(2) as job:
        await job.all_connected()
        member = job.members[1]
        waiting = asyncio.ensure_future(member.consult("t", b"", never))
        await settled(lambda: job.server.hub.num_open)
        await member.close()
        await member.close()
        for e in await outcomes([waiting, member.consult("t", b"", never)]):
            assert isinstance(e, EngineStateError)
        told = await member.object("t", OSError(), "stage")
        assert isinstance(told, EngineStateError)


async def test_a_member_that_is_closed_says_so_though_it_was_lost_before():
    async with star(2) as job:
        await job.all_connected()
        job.kill(0)
        with pytest.raises(PeerError, match="rank 0 was lost"):
            await job.members[1].consult("t", b"", never)
        await job.members[1].close()
        with pytest.raises(EngineStateError, match="closed"):
            await job.members[1].consult("t", b"", never)


async def test_a_member_that_never_connected_closes():
    async with star(2) as job:
        await job.members[1].close()
        assert job.doors[1].num_connects == 0


async def test_closing_ends_a_connect_that_waits():
    async with star(2) as job:
        member, door = job.members[1], job.doors[1]
        at_the_door = asyncio.Event()

        async def wait_for_ever(_):
            at_the_door.set()
            await asyncio.Event().wait()

        door.connect = wait_for_ever
        calls = [asyncio.ensure_future(member.consult("t", b"", never)) for _ in "ab"]
        await at_the_door.wait()
        await member.close()
        for e in await outcomes(calls):
            assert isinstance(e, EngineStateError)


async def test_what_was_decided_last_reaches_all_though_the_hub_closes_at_once(
    monkeypatch,
):
    # Which is what megabytes may take on a busy machine.
    monkeypatch.setattr("aiockpt.ranks.server._GOODBYE_S", LIMIT_S)
    monkeypatch.setattr("aiockpt.ranks.link._GOODBYE_S", LIMIT_S)
    async with star(4) as job:
        await job.all_connected()
        verdict = bytes(range(256)) * (1 << 14)

        async def decide(words):
            return verdict

        async def consult_and_close(member):
            outcome = await member.consult("t", b"", decide)
            await member.close()
            return outcome

        calls = [consult_and_close(m) for m in job.members]
        assert await asyncio.gather(*calls) == [verdict] * 4


async def test_a_word_too_long_is_refused_before_anything_is_said():
    async with star(2) as job:
        with pytest.raises(InvalidArgumentError, match="at most"):
            await job.members[1].consult("t", bytes(MAX_WORD_BYTES + 1), never)
        assert job.doors[1].num_connects == 0


async def test_a_verdict_too_long_fails_on_all():
    async def decide(words):
        return bytes(MAX_WORD_BYTES + 1)

    async with star(2) as job:
        raised = await outcomes(m.consult("t", b"", decide) for m in job.members)
        assert [type(e) for e in raised] == [InvalidArgumentError] * 2


async def test_words_of_megabytes_reach_a_chair_elsewhere():
    async with star(3) as job:
        group = [2, 1, 0]
        words = [bytes([rank]) * (5 << 20) for rank in range(3)]
        calls = [
            m.consult("t", words[m.rank], joined, group=group) for m in job.members
        ]
        assert await asyncio.gather(*calls) == [b"|".join(reversed(words))] * 3


async def test_rank_0_insists_on_what_it_decides_or_hears_that_it_is_too_late():
    async with star(2) as job:
        views = [scoped(member, "a/") for member in job.members]
        hub = job.server.hub

        def expire() -> None:
            (instance,) = hub._open["a/t", None]
            if instance.timer is not None:
                hub._expire(instance)

        async def in_time(_: object) -> bytes:
            await views[0].insist("t")
            expire()
            return b"verdict"

        async def too_late(_: object) -> bytes:
            expire()
            await views[0].insist("t")
            raise AssertionError

        calls = [view.consult("t", b"", in_time) for view in views]
        assert await outcomes(calls) == [b"verdict"] * 2
        calls = [view.consult("t", b"", too_late) for view in views]
        told = [(error.rank, error.phase) for error in await outcomes(calls)]
        assert told == [(0, "decide")] * 2


async def test_views_with_other_prefixes_do_not_mix():
    async with star(2) as job:
        a = [scoped(m, "a/") for m in job.members]
        b = [scoped(m, "b/") for m in job.members]
        early = asyncio.ensure_future(a[0].consult("t", b"a", joined))
        assert await consult_all(b, "t") == [b"0|1"] * 2
        assert await a[1].consult("t", b"a", never) == b"a|a"
        assert await early == b"a|a"
        told = await b[1].object("t", OSError("no"), "stage")
        (raised,) = await outcomes([b[0].consult("t", b"", never)])
        assert str(raised) == str(told)
        await a[1].close()
        assert await consult_all(job.members, "t") == [b"0|1"] * 2


async def test_a_failed_call_keeps_nothing_alive():
    class Tensor:
        pass

    async def fail(words):
        tensor = Tensor()
        kept.append(weakref.ref(tensor))
        raise OSError("no")

    kept = []
    async with star(2) as job:
        gc.collect()
        gc.disable()
        try:
            await outcomes(m.consult("t", b"", fail) for m in job.members)
            await asyncio.sleep(0)  # The loop holds on to what it has just told.
            assert kept[0]() is None
        finally:
            gc.enable()


async def test_a_failure_that_is_passed_on_is_that_of_the_rank_it_was_on():
    async with star(2) as job:
        cause = OSError("disk full")
        calls = [
            job.members[0].object("one", cause, "write"),
            job.members[1].consult("one", b"", never),
        ]
        own, told = await outcomes(calls)
        calls = [
            job.members[1].object("two", told, "stage"),
            job.members[0].object("two", own, "stage"),
        ]
        for error in await outcomes(calls):
            assert (error.rank, error.phase) == (0, "write")
            assert str(error) == "rank 0 failed in write: OSError: disk full"
        assert own.__cause__ is cause
