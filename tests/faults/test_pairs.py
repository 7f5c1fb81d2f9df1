"""Row 1, of two ranks: an error on either is one error on both, and costs no tag."""

import asyncio
import errno
import itertools
import math
import os

import pytest

from aiockpt.errors import StorageError
from aiockpt.ranks.member import Member
from aiockpt.saver import Saver
from aiockpt.testing.faults import Fail, Fault
from aiockpt.testing.roots import assert_root_consistent
from faults.driver import Outcome, assert_survived, link_root, published_seeds
from faults.pairs import (
    PAIR_WORKLOADS,
    Pair,
    assert_both_tell,
    cause_of,
    pair,
    spoil_pair,
)
from faults.test_system_errors import ERRNOS
from workloads import START, Engine

DONE = {**START, "new": 3}


@pytest.mark.parametrize("name", PAIR_WORKLOADS)
@pytest.mark.parametrize("num_times", [1, math.inf], ids=["once", "for ever"])
def test_an_error_on_one_rank_is_told_by_both_and_loses_nothing(
    cases, template, name, num_times
):
    kind = f"{'once' if num_times == 1 else 'for ever'}, {name}"
    for start in range(0, len(ERRNOS), cases.pick(6, 2)):
        for index in itertools.count(1):
            number = ERRNOS[(start + index) % len(ERRNOS)]
            root = link_root(template)
            fault = Fault((), Fail(number), nth=index, num_times=num_times)
            with pair(root) as ranks:
                outcome, injection = spoil_pair(ranks, PAIR_WORKLOADS[name], fault)
                if not injection.spoiled:
                    break
                with cases.case(1, kind, f"{injection.spoiled[0]}, {number}"):
                    check(ranks, outcome, number, is_once=num_times == 1, name=name)
            assert_survived(root, "save", Outcome(), may_stay=True)
        assert index > 60


def check(ranks: Pair, outcome: Outcome, number: int, *, is_once: bool, name: str):
    root = ranks.engines[0].root
    if outcome.is_done:
        assert published_seeds(root) == DONE
        return
    assert_both_tell(outcome.errors, os.strerror(number))
    cause = cause_of(outcome.errors)
    assert cause.errno == number
    assert str(cause.filename).startswith(root)
    if is_once:
        assert published_seeds(root) == START
        retried, _ = spoil_pair(ranks, PAIR_WORKLOADS[name])
        assert retried.is_done, retried.errors
        assert published_seeds(root) == DONE


def test_a_rank_tells_its_cause_where_the_other_was_quicker(template, monkeypatch):
    """Rank 1 fails the second file of rank 0 before that has failed the first."""
    consult, object_, transfer = Member.consult, Member.object, Saver.transfer
    has_failed, is_refused = [asyncio.Event(), asyncio.Event()], asyncio.Event()
    loops = {}

    async def late(self, topic, *args, **kw):
        loops[self.rank] = asyncio.get_running_loop()
        if topic.endswith("/sub/opt.pt/checksums"):
            await has_failed[self.rank].wait()
        return await consult(self, topic, *args, **kw)

    async def slow(self, topic, *args, **kw):
        told = await object_(self, topic, *args, **kw)
        has_failed[self.rank].set()
        if self.rank == 0 and topic.endswith("/model.pt/checksums"):
            await is_refused.wait()
        elif self.rank == 0:
            is_refused.set()
        return told

    async def broken(self, save, plan, file):
        if save.path == "model.pt" and asyncio.get_running_loop() is loops[0]:
            raise StorageError(errno.EIO, "broken", "disk")
        return await transfer(self, save, plan, file)

    monkeypatch.setattr(Member, "consult", late)
    monkeypatch.setattr(Member, "object", slow)
    monkeypatch.setattr(Saver, "transfer", broken)
    with pair(link_root(template)) as ranks:
        outcome, _ = spoil_pair(ranks, PAIR_WORKLOADS["2 ranks, the same files"])
    assert_both_tell(outcome.errors, "broken")
    assert cause_of(outcome.errors).errno == errno.EIO


def test_two_ranks_that_are_not_disturbed_save_what_one_saves(template):
    root = link_root(template)
    for work in PAIR_WORKLOADS.values():
        with pair(root) as ranks:
            outcome, _ = spoil_pair(ranks, work)
            assert outcome.is_done, outcome.errors
        assert published_seeds(root) == DONE
        with Engine(root) as engine:
            engine.delete("new")
    assert_root_consistent(root, acked=[*START], is_swept=True)
