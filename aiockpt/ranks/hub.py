"""Brings together what the members say: the logic, without the network.

Everything happens in callbacks of one loop. What a member says is worth a few
dictionary operations, so that thousands of members cost one pass over their words.
"""

__all__ = ["Hub"]

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from aiockpt.ranks.connection import ProtocolError
from aiockpt.ranks.failures import lost, not_there
from aiockpt.ranks.instance import Instance, Key
from aiockpt.ranks.messages import (
    MAX_FRAME_BYTES,
    Decision,
    Failed,
    Failure,
    Farewell,
    FromHub,
    FromMember,
    Insistence,
    Objection,
    Verdict,
    Veto,
    Withdrawal,
    Withdrawn,
    Word,
    Words,
)

_logger = logging.getLogger(__name__)

_WARN_AFTER_S = 10.0
# Of the time for the words, counted from the first one as well. A member takes the hub
# for lost after twice that time, so it hears of this first.
_DECIDE_FACTOR = 1.5
# The frame around words; each has a few bytes of its own.
_WORD_OVERHEAD_BYTES = 16


class _Seat:
    """A member: how it is spoken to, and which of its calls are open."""

    __slots__ = ("calls", "last_call", "send")

    def __init__(self, send: Callable[[FromHub], object]) -> None:
        self.send = send
        self.calls: dict[int, Instance] = {}
        self.last_call = 0


class Hub:
    """Matches the nth uses of a topic, of all its members."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        """Nobody is there yet.

        Args:
            world_size: Ranks of the job.
            timeout_s: How long the first of a topic waits for the last.
        """
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._seats: dict[int, _Seat] = {}
        self._gone: dict[int, str] = {}
        # Those that some member has not used, oldest first. The first one that a member
        # has not used is its nth where it has used n - 1: nothing needs to be counted.
        self._open: dict[Key, list[Instance]] = {}
        # How topics begin that cannot come to anything any more, and why.
        self._refused: dict[str, Failure] = {}

    @property
    def num_open(self) -> int:
        """How many uses of topics are remembered."""
        return sum(len(instances) for instances in self._open.values())

    def check_rank(self, rank: int) -> None:
        """Returns where the rank may join.

        Raises:
            ProtocolError: There is no such rank, or it has joined before.
        """
        if not 0 <= rank < self._world_size:
            raise ProtocolError(f"there is no rank {rank} of {self._world_size}")
        if rank in self._seats or rank in self._gone:
            raise ProtocolError(f"rank {rank} has joined before")

    def join(self, rank: int, send: Callable[[FromHub], object]) -> None:
        """From here on the rank is a member; `send` speaks to it, and never fails.

        Raises:
            ProtocolError: As `check_rank`.
        """
        self.check_rank(rank)
        self._seats[rank] = _Seat(send)

    def receive(self, rank: int, message: FromMember) -> None:
        """Acts on what a member says; what one says that has left goes unheard.

        Raises:
            ProtocolError: It must not be said, or not now.
        """
        if rank not in self._seats:
            return
        match message:
            case Word():
                self._hand_in(self._come(rank, message), rank, message.word)
            case Objection():
                instance = self._come(rank, message)
                if instance.failure is None:
                    self._fail(instance, message.failure, rank, message.scope)
                else:
                    self._tell_failure(instance, rank)
            case Veto(call, failure, scope):
                called = self._called(rank, call)
                # An unknown call has been told how it ended meanwhile.
                if called is not None and called.is_collecting:
                    self._fail(called, failure, rank, scope)
            case Withdrawal(call):
                self._withdraw(rank, call)
            case Insistence() | Decision():
                self._hear_chair(rank, message)
            case _:
                raise ProtocolError(f"rank {rank} said {type(message).__name__}")

    def leave(self, rank: int, phase: str) -> None:
        """The rank is gone: what needs it fails, now and later."""
        if self._seats.pop(rank, None) is None:
            return
        self._gone[rank] = phase
        for instance in [i for open_ in self._open.values() for i in open_]:
            if rank not in instance.members:
                continue
            instance.came.add(rank)
            instance.waiting.pop(rank, None)
            # While another decides, the word of the one that is gone is in.
            is_undecided = instance.is_deciding and instance.chair == rank
            if instance.is_collecting or is_undecided:
                self._fail(instance, lost(rank, phase))
            self._forget_if_known(instance)

    def close(self) -> None:
        """Tells all members that nothing will be decided any more. Idempotent."""
        for seat in self._seats.values():
            seat.send(Farewell())
        for open_ in self._open.values():
            for instance in open_:
                instance.stop_timer()
        self._seats.clear()
        self._open.clear()

    def _come(self, rank: int, message: Word | Objection) -> Instance:
        """The use of the topic that this call belongs to."""
        seat = self._seats[rank]
        if message.call <= seat.last_call:
            raise ProtocolError(f"rank {rank} made call {message.call} twice")
        seat.last_call = message.call
        self._check_group(rank, message.group)
        return self._use(rank, message.call, (message.topic, message.group))

    def _check_group(self, rank: int, group: tuple[int, ...] | None) -> None:
        if group is None:
            return
        is_known = min(group, default=-1) >= 0 and max(group) < self._world_size
        if not is_known or len(set(group)) < len(group) or rank not in group:
            raise ProtocolError(f"rank {rank} named a group that is none")

    def _use(self, rank: int, call: int, key: Key) -> Instance:
        instances = self._open.get(key, ())
        unused = (i for i in instances if rank not in i.came)
        instance = next(unused, None) or self._opened(key)
        instance.came.add(rank)
        instance.waiting[rank] = call
        self._seats[rank].calls[call] = instance
        return instance

    def _opened(self, key: Key) -> Instance:
        members = range(self._world_size) if key[1] is None else key[1]
        instance = Instance(key, members, self._loop.time())
        self._open.setdefault(key, []).append(instance)
        gone = [rank for rank in self._gone if rank in members]
        refused = (self._refused[s] for s in self._refused if key[0].startswith(s))
        if gone:
            instance.came.update(gone)
            instance.failure = lost(gone[0], self._gone[gone[0]])
        elif failure := next(refused, None):
            instance.failure = failure
        else:
            self._await_words(instance)
        return instance

    def _hand_in(self, instance: Instance, rank: int, word: bytes) -> None:
        if instance.failure is not None:
            self._tell_failure(instance, rank)
            return
        instance.words[rank] = word
        if instance.have_all_come:
            self._ask_chair(instance)

    def _ask_chair(self, instance: Instance) -> None:
        chair = instance.chair
        words = instance.take_words()
        nbytes = sum(len(word) + _WORD_OVERHEAD_BYTES for word in words)
        if nbytes > MAX_FRAME_BYTES:
            text = f"the words on {instance.key[0]!r} are {nbytes} bytes together"
            text += f": at most {MAX_FRAME_BYTES} can be decided on"
            self._fail(instance, Failure(text, "argument"))
            return
        instance.is_deciding = True
        self._expire_at(instance, self._timeout_s * _DECIDE_FACTOR)
        self._seats[chair].send(Words(instance.waiting[chair], words))

    def _hear_chair(self, rank: int, message: Insistence | Decision) -> None:
        instance = self._called(rank, message.call)
        # Unknown where it took the chair too long: the members have been told.
        if instance is None or not instance.is_deciding or instance.chair != rank:
            return
        if isinstance(message, Insistence):
            instance.stop_timer()
        else:
            self._decide(instance, rank, message)

    def _decide(self, instance: Instance, rank: int, decision: Decision) -> None:
        if decision.verdict is None:
            failure = decision.failure or Failure("nothing was decided", rank=rank)
            self._fail(instance, failure, rank)
            return
        for member, call in instance.waiting.items():
            seat = self._seats[member]
            del seat.calls[call]
            seat.send(Verdict(call, decision.verdict))
        self._forget(instance)

    def _withdraw(self, rank: int, call: int) -> None:
        instance = self._called(rank, call)
        if instance is None or not instance.is_collecting:
            return  # It is told, or will be, what it came to.
        # The member's later calls on the topic move up: this one was never made.
        instances = self._open[instance.key]
        newer = instances[instances.index(instance) + 1 :]
        later = [i for i in newer if rank in i.waiting]
        moving = [(i.waiting[rank], i.words[rank]) for i in later]
        for i in [instance, *later]:
            self._take_back(i, rank)
        self._seats[rank].send(Withdrawn(call))
        for later_call, word in moving:
            self._hand_in(self._use(rank, later_call, instance.key), rank, word)
        for i in [instance, *later]:
            if not i.came:
                self._forget(i)

    def _take_back(self, instance: Instance, rank: int) -> None:
        instance.came.remove(rank)
        del instance.words[rank]
        del self._seats[rank].calls[instance.waiting.pop(rank)]

    def _called(self, rank: int, call: int) -> Instance | None:
        return self._seats[rank].calls.get(call)

    def _fail(
        self,
        instance: Instance,
        failure: Failure,
        culprit: int | None = None,
        scope: str = "",
    ) -> None:
        """Tells those who wait; the others when they come."""
        instance.failure = failure
        if scope:
            instance.scope = scope
            self._refused[scope] = failure
            for other in [i for open_ in self._open.values() for i in open_]:
                if other.is_collecting and other.key[0].startswith(scope):
                    self._fail(other, failure)
        instance.is_deciding = False
        instance.stop_timer()
        instance.words.clear()
        for rank in list(instance.waiting):
            self._tell_failure(instance, rank, is_own=rank == culprit)
        self._forget_if_known(instance)

    def _tell_failure(
        self, instance: Instance, rank: int, *, is_own: bool = False
    ) -> None:
        assert instance.failure is not None
        seat, call = self._seats[rank], instance.waiting.pop(rank)
        del seat.calls[call]
        # Another rank may have been quicker to pass on what happened on this one.
        is_own = is_own or instance.failure.rank == rank
        seat.send(Failed(call, instance.failure, is_own))
        self._forget_if_known(instance)

    def _forget_if_known(self, instance: Instance) -> None:
        is_known = instance.have_all_come and not instance.waiting
        if instance.failure is not None and is_known:
            self._forget(instance)

    def _forget(self, instance: Instance) -> None:
        instance.stop_timer()
        if instance.scope:
            self._end_scope(instance.scope)
        instances = self._open.get(instance.key, [])
        if instance in instances:
            instances.remove(instance)
            if not instances:
                del self._open[instance.key]

    def _end_scope(self, scope: str) -> None:
        """All members know why: nobody comes to those topics any more."""
        self._refused.pop(scope, None)
        for key in [key for key in self._open if key[0].startswith(scope)]:
            for instance in self._open.pop(key):
                instance.stop_timer()

    def _await_words(self, instance: Instance) -> None:
        if self._timeout_s > _WARN_AFTER_S:
            warn = partial(self._warn, instance)
            instance.timer = self._loop.call_later(_WARN_AFTER_S, warn)
        else:
            self._expire_at(instance, self._timeout_s)

    def _warn(self, instance: Instance) -> None:
        missing = not_there(instance.missing())
        _logger.warning("%r still waits for %s", instance.key[0], missing)
        self._expire_at(instance, self._timeout_s)

    def _expire_at(self, instance: Instance, age_s: float) -> None:
        instance.stop_timer()
        when_s = instance.opened_s + age_s
        instance.timer = self._loop.call_at(when_s, partial(self._expire, instance))

    def _expire(self, instance: Instance) -> None:
        within = f"{instance.key[0]!r} within"
        if instance.is_deciding:
            rank, age_s = instance.chair, self._timeout_s * _DECIDE_FACTOR
            text = f"rank {rank} did not decide on {within} {age_s:g} s"
            failure = Failure(text, rank=rank, phase="decide")
        else:
            missing = instance.missing()
            text = (
                f"{not_there(missing)} did not come to {within} {self._timeout_s:g} s"
            )
            failure = Failure(text, rank=min(missing), phase="late")
        self._fail(instance, failure)
