"""`aiockpt.ranks.hub.Hub`: the nth uses of a topic belong together, whatever happens."""

import asyncio
import logging
import random
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.ranks.connection import ProtocolError
from aiockpt.ranks.failures import not_there
from aiockpt.ranks.hub import Hub
from aiockpt.ranks.messages import (
    Decision,
    Failed,
    Failure,
    Farewell,
    Hello,
    Insistence,
    Objection,
    Verdict,
    Veto,
    Withdrawal,
    Withdrawn,
    Word,
    Words,
)
from ranks.stars import settled

NUM_MEMBERS = 5


class Job:
    """A hub, and members who remember what they are told."""

    def __init__(self, world_size: int = NUM_MEMBERS, timeout_s: float = 1000) -> None:
        self.hub = Hub(world_size, timeout_s)
        self.told = defaultdict(dict)
        self.asked = {}
        self.last_call = [0] * world_size
        for rank in range(world_size):
            self.hub.join(rank, lambda message, rank=rank: self.hear(rank, message))

    def hear(self, rank, message):
        if isinstance(message, Words):
            self.asked[rank, message.call] = message.words
        elif not isinstance(message, Farewell):
            assert message.call not in self.told[rank], "told twice"
            self.told[rank][message.call] = message

    def word(self, rank, topic="t", group=None, word=None):
        self.last_call[rank] += 1
        call = self.last_call[rank]
        word = b"%d" % rank if word is None else word
        self.hub.receive(rank, Word(call, topic, word, group))
        return call

    def objection(self, rank, topic="t", group=None, scope=""):
        self.last_call[rank] += 1
        call = self.last_call[rank]
        failure = Failure(f"{rank}-{call}", rank=rank, phase="test")
        self.hub.receive(rank, Objection(call, topic, failure, group, scope))
        return call

    def decide(self, rank, call):
        words = self.asked.pop((rank, call))
        self.hub.receive(rank, Decision(call, b"|".join(words)))

    def texts(self):
        return {
            rank: [m.failure.text for m in messages.values()]
            for rank, messages in self.told.items()
        }


@pytest.fixture
async def job():
    job = Job()
    yield job
    job.hub.close()


async def test_the_chair_is_asked_once_all_words_are_there_and_all_are_told(job):
    for rank in (3, 0, 4, 1):
        job.word(rank)
    assert not job.asked
    job.word(2)
    assert job.asked == {(0, 1): [b"0", b"1", b"2", b"3", b"4"]}
    assert not job.told
    job.decide(0, 1)
    assert job.told == {rank: {1: Verdict(1, b"0|1|2|3|4")} for rank in range(5)}
    assert job.hub.num_open == 0


async def test_a_group_has_its_own_chair_order_and_uses(job):
    for rank in (1, 4):
        job.word(rank, group=(4, 1))
    job.word(1)
    assert job.asked == {(4, 1): [b"4", b"1"]}
    job.decide(4, 1)
    assert set(job.told) == {1, 4}


async def test_an_objection_tells_those_who_wait_and_those_who_come_later(job):
    job.word(0)
    job.word(1)
    job.objection(3)
    assert set(job.told) == {0, 1, 3}
    job.objection(2)
    job.word(4)
    assert job.texts() == {rank: ["3-1"] for rank in range(5)}
    assert job.told[3][1].is_own
    assert not any(job.told[rank][1].is_own for rank in (0, 1, 2, 4))
    assert job.hub.num_open == 0
    job.word(4)
    assert job.hub.num_open == 1
    assert len(job.told[4]) == 1


@pytest.mark.parametrize("is_veto", [False, True])
async def test_an_objection_ends_all_topics_of_its_scope_for_those_who_wait_and_come(
    job, is_veto
):
    job.word(0, "save x/1", group=(0, 1, 2))
    job.word(1, "saved")
    if is_veto:
        call = job.word(2, "end")
        job.hub.receive(2, Veto(call, Failure("2-1", rank=2), "save x/"))
    else:
        job.objection(2, "end", scope="save x/")
    assert job.texts() == {0: ["2-1"], 2: ["2-1"]}
    job.word(1, "save x/1", group=(0, 1, 2))
    job.word(3, "save x/2", group=(3, 4))
    assert job.texts() == {rank: ["2-1"] for rank in range(4)}
    # Until all have been told, by the topic itself.
    for rank in (0, 1, 3, 4):
        job.word(rank, "end")
    assert job.texts()[4] == ["2-1"]
    assert job.hub.num_open == 1  # "saved", which is another matter
    assert not job.hub._refused
    # The name may be used again.
    job.word(3, "save x/2", group=(3, 4))
    job.word(4, "save x/2", group=(3, 4))
    assert len(job.asked) == 1


async def test_an_objection_that_is_too_late_ends_no_other_topic(job):
    job.word(0, "save x/1")
    calls = [job.word(rank, "end") for rank in range(5)]
    job.hub.receive(2, Veto(calls[2], Failure("no", rank=2), "save x/"))
    assert not job.told
    assert not job.hub._refused


async def test_a_veto_stands_for_the_word_that_waits(job):
    call = job.word(2)
    job.hub.receive(2, Veto(call, Failure("no", rank=2)))
    assert job.told == {2: {1: Failed(1, Failure("no", rank=2), is_own=True)}}
    for rank in (0, 1, 3, 4):
        job.word(rank)
    assert job.texts() == {rank: ["no"] for rank in range(5)}
    assert job.hub.num_open == 0


async def test_a_veto_is_too_late_once_the_chair_decides(job):
    for rank in range(5):
        job.word(rank)
    job.hub.receive(2, Veto(1, Failure("no", rank=2)))
    assert not job.told
    job.decide(0, 1)
    job.hub.receive(2, Veto(1, Failure("no", rank=2)))
    assert all(isinstance(job.told[rank][1], Verdict) for rank in range(5))
    assert job.hub.num_open == 0


async def test_a_withdrawn_word_was_never_handed_in(job):
    job.word(2)
    job.hub.receive(2, Withdrawal(1))
    assert job.told == {2: {1: Withdrawn(1)}}
    assert job.hub.num_open == 0
    for rank in (0, 1, 3, 4):
        job.word(rank)
    assert not job.asked
    job.word(2, word=b"again")
    assert job.asked == {(0, 1): [b"0", b"1", b"again", b"3", b"4"]}
    job.decide(0, 1)


async def test_later_words_move_up_when_one_is_withdrawn(job):
    job.word(2, word=b"first")
    job.word(2, word=b"second")
    job.word(2, word=b"third")
    job.hub.receive(2, Withdrawal(1))
    for rank in (0, 1, 3, 4):
        job.word(rank)
    assert job.asked[0, 1][2] == b"second"
    job.decide(0, 1)
    assert set(job.told[2]) == {1, 2}
    for rank in (0, 1, 3, 4):
        job.word(rank)
    assert job.asked[0, 2][2] == b"third"
    job.decide(0, 2)
    assert job.hub.num_open == 0


async def test_it_is_too_late_to_withdraw_while_the_chair_decides(job):
    for rank in range(5):
        job.word(rank)
    job.hub.receive(2, Withdrawal(1))
    assert not job.told
    job.decide(0, 1)
    job.hub.receive(2, Withdrawal(1))
    assert isinstance(job.told[2][1], Verdict)


@pytest.mark.parametrize("phase", ["lost", "closed"])
async def test_what_needs_one_that_is_gone_fails_now_and_later(job, phase):
    job.word(0)
    job.word(1, group=(1, 2))
    job.hub.leave(3, phase)
    assert set(job.told) == {0}
    failure = job.told[0][1].failure
    assert (failure.rank, failure.phase) == (3, phase)
    for rank in (1, 2, 4):
        job.word(rank)
        assert job.told[rank].popitem()[1].failure == failure
    assert job.hub.num_open == 1
    job.word(2, group=(1, 2))
    job.decide(1, 1)
    assert isinstance(job.told[2][2], Verdict)
    assert job.hub.num_open == 0


async def test_a_verdict_stands_when_another_than_the_chair_is_lost_meanwhile(job):
    for rank in range(5):
        job.word(rank)
    job.hub.leave(3, "lost")
    assert not job.told
    job.decide(0, 1)
    assert all(isinstance(job.told[rank][1], Verdict) for rank in (0, 1, 2, 4))
    assert job.hub.num_open == 0


async def test_a_chair_that_is_lost_while_it_decides_fails_the_others(job):
    for rank in range(5):
        job.word(rank)
    job.hub.leave(0, "lost")
    assert job.texts() == {rank: ["rank 0 was lost"] for rank in range(1, 5)}
    assert job.hub.num_open == 0


async def test_only_the_chair_decides_and_only_when_it_was_asked(job):
    for rank in range(4):
        job.word(rank)
    job.hub.receive(0, Decision(1, b"early"))
    job.word(4)
    job.hub.receive(2, Decision(1, b"not the chair"))
    assert not job.told
    job.decide(0, 1)
    assert job.told[1][1] == Verdict(1, b"0|1|2|3|4")


async def test_who_does_not_come_in_time_is_named():
    job = Job(timeout_s=0.01)
    job.word(0)
    job.word(4)
    await settled(lambda: len(job.told) == 2)
    failure = job.told[0][1].failure
    assert failure.text == "ranks 1-3 did not come to 't' within 0.01 s"
    assert (failure.rank, failure.phase) == (1, "late")
    job.word(2)
    assert job.told[2][1].failure == failure
    assert job.hub.num_open == 1
    for rank in (1, 3):
        job.word(rank)
    assert job.hub.num_open == 0


async def test_a_chair_that_does_not_decide_is_named_to_all_and_to_itself():
    job = Job(timeout_s=0.01)
    for rank in range(5):
        job.word(rank)
    await settled(lambda: len(job.told) == 5)
    failure = job.told[0][1].failure
    assert "rank 0 did not decide on 't'" in failure.text
    assert (failure.rank, failure.phase) == (0, "decide")
    job.decide(0, 1)
    assert job.hub.num_open == 0


async def test_a_chair_that_insists_may_take_its_time_unless_it_is_lost():
    job = Job(timeout_s=0.01)
    for topic in "tu":
        for rank in range(5):
            job.word(rank, topic)
        (instance,) = job.hub._open[topic, None]
        job.hub.receive(1, Insistence(job.last_call[1]))
        assert instance.timer is not None, "only the chair can"
        job.hub.receive(0, Insistence(job.last_call[0]))
        assert instance.timer is None
    later = job.word(1, "the time is over")
    await settled(lambda: later in job.told[1])
    assert not job.told[0]
    job.decide(0, 1)
    assert {job.told[rank][1].verdict for rank in range(5)} == {b"0|1|2|3|4"}
    job.hub.leave(0, "lost")
    assert (job.told[1][2].failure.rank, job.told[1][2].failure.phase) == (0, "lost")


async def test_a_chair_that_insists_too_late_changes_nothing():
    job = Job()
    job.word(0)
    job.hub.receive(0, Insistence(1))
    for rank in range(1, 5):
        job.word(rank)
    (instance,) = job.hub._open["t", None]
    job.hub._expire(instance)
    job.hub.receive(0, Insistence(1))
    assert {job.told[rank][1].failure.phase for rank in range(5)} == {"decide"}
    assert job.hub.num_open == 0


async def test_whoever_is_missing_is_named_in_the_log_after_a_while(
    monkeypatch, caplog
):
    monkeypatch.setattr("aiockpt.ranks.hub._WARN_AFTER_S", 0.01)
    job = Job()
    with caplog.at_level(logging.WARNING, "aiockpt.ranks.hub"):
        job.word(1, topic="commit step-1")
        await settled(lambda: caplog.messages)
    assert caplog.messages == ["'commit step-1' still waits for ranks 0, 2-4"]
    job.hub.close()


async def test_a_deadline_does_not_outlive_what_it_was_for():
    job = Job(timeout_s=0.01)
    for rank in range(5):
        job.word(rank)
    job.decide(0, 1)
    job.word(3)
    job.hub.receive(3, Withdrawal(2))
    job.word(3)
    job.objection(2)
    done = dict(job.told[3])
    loop = asyncio.get_running_loop()
    assert not [t for t in loop._scheduled if not t.cancelled()]
    assert job.told[3] == done


@pytest.mark.parametrize(
    "message",
    [
        Word(1, "t", b"", (1, 2)),
        Word(1, "t", b"", ()),
        Word(1, "t", b"", (0, 0, 1)),
        Word(1, "t", b"", (0, 5)),
        Word(1, "t", b"", (-1, 0)),
        Word(0, "t", b"", None),
        Hello("", 0, 5),
    ],
)
async def test_what_a_member_must_not_say_is_refused_and_changes_nothing(job, message):
    with pytest.raises(ProtocolError):
        job.hub.receive(0, message)
    assert job.hub.num_open == 0


async def test_a_rank_joins_once(job):
    for rank in (2, 5, -1):
        with pytest.raises(ProtocolError):
            job.hub.join(rank, print)
    job.hub.leave(2, "closed")
    with pytest.raises(ProtocolError):
        job.hub.join(2, print)


async def test_words_that_fit_no_frame_fail_for_everyone(job, monkeypatch):
    monkeypatch.setattr("aiockpt.ranks.hub.MAX_FRAME_BYTES", 1000)
    for rank in range(5):
        job.word(rank, word=bytes(200))
    assert {m.failure.kind for told in job.told.values() for m in told.values()} == {
        "argument"
    }
    assert job.hub.num_open == 0


async def test_nothing_grows_over_100_000_uses():
    job = Job(world_size=2)
    for number in range(100_000):
        for rank in (0, 1):
            job.word(rank, topic=f"commit {number}")
        job.decide(0, number + 1)
        job.told.clear()
        assert job.hub.num_open == 0
        if number % 1000 == 0:
            await asyncio.sleep(0)
    assert not any(seat.calls for seat in job.hub._seats.values())
    # asyncio throws cancelled timers away in bulk.
    assert len(asyncio.get_running_loop()._scheduled) < 5000
    job.hub.close()


ACTIONS = ("word", "object", "veto", "withdraw", "decide", "leave")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(ACTIONS),
            st.integers(0, NUM_MEMBERS - 1),
            st.sampled_from("tu"),
            st.integers(0, 2),
        ),
        max_size=80,
    ),
    st.integers(0, 2**32),
)
def test_all_members_agree_on_every_use_whatever_the_order(actions, seed):
    async def run() -> None:
        Interleaving(seed).run(actions)

    asyncio.run(run())


class Interleaving:
    """Five members doing anything in any order; then all that is missing comes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.job = Job()
        # For each topic and rank, its calls in order, without the withdrawn.
        self.calls = {topic: [[] for _ in range(NUM_MEMBERS)] for topic in "tu"}
        self.gone = set()

    def run(self, actions) -> None:
        for action, rank, topic, number in actions:
            if rank not in self.gone:
                getattr(self, action)(rank, topic, number)
                self.drop_withdrawn()
        self.bring_to_an_end()
        self.check()

    def word(self, rank, topic, _):
        self.calls[topic][rank].append(self.job.word(rank, topic))

    def object(self, rank, topic, _):
        # The port vetoes where a word waits; the hub must cope with both.
        self.calls[topic][rank].append(self.job.objection(rank, topic))

    def veto(self, rank, topic, number):
        if open_ := self.open_calls(rank, topic):
            call = open_[number % len(open_)]
            failure = Failure(f"{rank}-{call}", rank=rank)
            self.job.hub.receive(rank, Veto(call, failure))

    def withdraw(self, rank, topic, number):
        if open_ := self.open_calls(rank, topic):
            self.job.hub.receive(rank, Withdrawal(open_[number % len(open_)]))

    def decide(self, rank, _, number):
        if asked := sorted(self.job.asked):
            chair, call = asked[number % len(asked)]
            if number == 2:
                self.job.asked.pop((chair, call))
                failure = Failure(f"decide {call}", rank=chair)
                self.job.hub.receive(chair, Decision(call, failure=failure))
            else:
                self.job.decide(chair, call)

    def leave(self, rank, _, number):
        if number == 0 and len(self.gone) < NUM_MEMBERS - 2:
            self.gone.add(rank)
            self.job.hub.leave(rank, "lost")
            for key in [key for key in self.job.asked if key[0] == rank]:
                del self.job.asked[key]

    def open_calls(self, rank, topic):
        told = self.job.told[rank]
        return [call for call in self.calls[topic][rank] if call not in told]

    def drop_withdrawn(self):
        for calls_of in self.calls.values():
            for rank, calls in enumerate(calls_of):
                told = self.job.told[rank]
                calls[:] = [c for c in calls if not isinstance(told.get(c), Withdrawn)]

    def bring_to_an_end(self):
        here = [rank for rank in range(NUM_MEMBERS) if rank not in self.gone]
        for topic, calls_of in self.calls.items():
            longest = max(len(calls) for calls in calls_of)
            missing = [r for r in here for _ in range(longest - len(calls_of[r]))]
            self.random.shuffle(missing)
            for rank in missing:
                self.word(rank, topic, 0)
        while self.job.asked:
            self.job.decide(*next(iter(self.job.asked)))

    def check(self):
        here = [rank for rank in range(NUM_MEMBERS) if rank not in self.gone]
        for calls_of in self.calls.values():
            for uses in zip(*(calls_of[rank] for rank in here), strict=True):
                told = [
                    self.job.told[rank][call]
                    for rank, call in zip(here, uses, strict=True)
                ]
                outcomes = {
                    m.verdict if isinstance(m, Verdict) else m.failure.text
                    for m in told
                }
                assert len(outcomes) == 1, outcomes
                assert sum(getattr(m, "is_own", False) for m in told) <= 1
        assert self.job.hub.num_open == 0
        assert not any(seat.calls for seat in self.job.hub._seats.values())


def test_ranks_are_named_in_runs():
    assert not_there([3]) == "rank 3"
    assert not_there([7, 3, 5, 6]) == "ranks 3, 5-7"
    assert not_there(range(4096)) == "ranks 0-4095"
