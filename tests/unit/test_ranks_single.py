"""`aiockpt.ranks.single.SingleRank`: the promises of `Ranks`, alone."""

import asyncio

import pytest

from aiockpt.ranks.single import SingleRank
from ranks.stars import joined


async def test_a_rank_alone_decides_on_its_own_word():
    ranks = SingleRank()
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert await ranks.consult("t", b"word", joined) == b"word"
    await ranks.close()


async def test_an_error_of_decide_is_raised_as_it_is():
    error = OSError("disk full")

    async def fail(words):
        raise error

    with pytest.raises(OSError, match="disk full") as caught:
        await SingleRank().consult("t", b"", fail)
    assert caught.value is error


async def test_a_cancellation_is_dropped_for_all_words_are_there():
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def decide(words):
        asked.set()
        await go_on.wait()
        return b"yes"

    call = asyncio.ensure_future(SingleRank().consult("t", b"", decide))
    await asked.wait()
    call.cancel()
    await asyncio.sleep(0)
    assert not call.done()
    go_on.set()
    assert await call == b"yes"
    assert call.cancelling() == 0


async def test_an_objection_is_the_error_itself():
    error = OSError("disk full")
    assert await SingleRank().object("t", error, "write") is error


@pytest.mark.parametrize("failure", [None, OSError("disk full")])
async def test_an_objection_while_it_is_decided_is_too_late(failure):
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def decide(words):
        asked.set()
        await go_on.wait()
        if failure:
            raise failure
        return b"yes"

    ranks = SingleRank()
    call = asyncio.ensure_future(ranks.consult("t", b"", decide))
    await asked.wait()
    error = ValueError("late")
    objection = asyncio.ensure_future(ranks.object("t", error, "write"))
    assert await ranks.object("another", error, "write") is error
    assert not objection.done()
    go_on.set()
    assert await objection is failure
    await asyncio.wait([call])
    assert call.exception() is failure
    assert await ranks.object("t", error, "write") is error
