"""A rank of a job that has a hub."""

__all__ = ["Door", "Link", "Member"]

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from typing_extensions import override

from aiockpt.errors import InvalidArgumentError, PeerError
from aiockpt.ranks.answer import answer
from aiockpt.ranks.base import Decide, Ranks
from aiockpt.ranks.call import Call
from aiockpt.ranks.failures import decision_failure, lost, made, objection
from aiockpt.ranks.instance import Key
from aiockpt.ranks.messages import (
    MAX_WORD_BYTES,
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
from aiockpt.threads import finish, outlast

_CLOSED = Failure("the ranks have been closed", "state")


class Link(Protocol):
    """A member's way to the hub."""

    def send(self, message: FromMember) -> None:
        """Tells the hub; never fails."""
        ...

    def abort(self) -> None:
        """Gives the hub up."""
        ...

    async def close(self) -> None:
        """Says goodbye, and returns when nothing of the link is left.

        If cancelled: what is left is aborted.
        """
        ...


class Door(Protocol):
    """Where the hub is found."""

    async def connect(self, member: "Member") -> Link:
        """Returns a link that tells `member` what the hub says.

        Raises:
            OSError: The hub could not be reached.

        If cancelled: nothing of the link is left; it can be tried again.
        """
        ...

    async def close(self) -> None:
        """Ends the hub where it is in this process. Idempotent.

        If cancelled: what is left is aborted.
        """
        ...


class Member(Ranks):
    """One rank; it finds the hub when it is first used."""

    def __init__(
        self, rank: int, world_size: int, door: Door, *, timeout_s: float
    ) -> None:
        """Connects nothing yet.

        Args:
            rank: Of this process.
            world_size: Ranks of the job.
            door: Where the hub is found.
            timeout_s: How long others may keep this one waiting. A hub that says
                nothing for twice that time is taken for lost.
        """
        self.rank = rank
        self.world_size = world_size
        self._door = door
        self._timeout_s = timeout_s
        self._link: Link | None = None
        self._connecting = asyncio.Lock()
        self._patience: asyncio.Timeout | None = None
        self._end: Failure | None = None
        # What the hub will answer, and what `consult` has not returned from.
        self._calls: dict[int, Call] = {}
        self._consulting: list[Call] = []
        self._last_call = 0

    @override
    async def consult(
        self,
        topic: str,
        word: bytes,
        decide: Decide,
        *,
        group: Sequence[int] | None = None,
    ) -> bytes:
        """See `Ranks.consult`."""
        members = self._checked(group)
        if len(word) > MAX_WORD_BYTES:
            text = f"a word of {len(word)} bytes: at most {MAX_WORD_BYTES} are told"
            raise InvalidArgumentError(text)
        link = await self._connected()
        call = self._call(topic, members)
        self._consulting.append(call)
        try:
            link.send(Word(call.number, topic, word, members))
            return await self._verdict(link, call, decide)
        finally:
            self._consulting.remove(call)
            del call  # as in `threads.settle`

    @override
    async def object(
        self,
        topic: str,
        error: Exception,
        phase: str,
        *,
        group: Sequence[int] | None = None,
        scope: str = "",
    ) -> Exception | None:
        """See `Ranks.object`; what goes wrong on the way is returned as well."""
        key = topic, self._checked(group)
        told = objection(self.rank, phase, error)
        return await outlast(self._object(key, error, told, scope))

    @override
    async def insist(self, topic: str) -> None:
        """See `Ranks.insist`. The hub is in this process: it hears of it at once."""
        (call,) = (c for c in self._consulting if c.key == (topic, None))
        if call.outcome.done() and (error := call.result()) is not None:
            raise error
        assert self._link is not None
        # This rank is the one that knows: it does not give itself up.
        call.stop_timer()
        self._link.send(Insistence(call.number))

    @override
    async def close(self) -> None:
        """See `Ranks.close`."""
        await outlast(self._close())

    def received(self, message: FromHub) -> None:
        """Acts on what the hub says."""
        match message:
            case Words(number, words):
                if call := self._calls.get(number):
                    call.hear(words)
            case Verdict(number, verdict):
                self._end_call(number, verdict)
            case Failed(number):
                self._end_call(number, message)
            case Withdrawn(number):
                if call := self._calls.pop(number, None):
                    call.forget()
            case Farewell():
                self.lose(lost(0, "closed"))
            case _:
                pass

    def lose(self, failure: Failure) -> None:
        """There is no hub any more: what is open fails, and whatever comes later."""
        if self._end is not None:
            return
        self._end = failure
        for number in list(self._calls):
            self._end_call(number, Failed(number, failure))

    def _checked(self, group: Sequence[int] | None) -> tuple[int, ...] | None:
        """The group; None where it is all ranks in their order."""
        if group is None or tuple(group) == tuple(range(self.world_size)):
            return None
        members = tuple(group)
        is_known = all(0 <= rank < self.world_size for rank in members)
        if is_known and len(set(members)) == len(members) and self.rank in members:
            return members
        text = f"{list(members)} is no group of rank {self.rank} of {self.world_size}"
        raise InvalidArgumentError(text)

    async def _connected(self) -> Link:
        async with self._connecting:
            if self._end is not None:
                raise made(self._end)
            if self._link is None:
                self._link = await self._connect()
            return self._link

    async def _connect(self) -> Link:
        """A link; `close` ends the wait for one."""
        try:
            async with asyncio.timeout(self._timeout_s) as self._patience:
                return await self._door.connect(self)
        except OSError as error:  # which a TimeoutError is
            if self._end is not None:
                raise made(self._end) from error
            reason = str(error) or f"it did not come within {self._timeout_s:g} s"
            text = f"rank 0 could not be reached: {reason}"
            raise PeerError(text, rank=0, phase="connect") from error
        finally:
            self._patience = None

    def _call(self, topic: str, members: tuple[int, ...] | None) -> Call:
        self._last_call += 1
        call = Call(self._last_call, (topic, members))
        self._calls[call.number] = call
        loop = asyncio.get_running_loop()
        call.timer = loop.call_later(2 * self._timeout_s, self._give_up)
        return call

    async def _verdict(self, link: Link, call: Call, decide: Decide) -> bytes:
        """Decides, where this is the chair; waits for what is decided."""
        withdraw = partial(self._withdraw, link, call)
        try:
            if self.rank == call.chair:
                words = await answer(call.words, withdraw)
                if words is not None:
                    await self._decide(link, call, decide, words)
            outcome = await answer(call.outcome, withdraw)
            if isinstance(outcome, Failed):
                raise call.error(outcome)
            return outcome
        finally:
            del call, withdraw

    def _end_call(self, number: int, outcome: bytes | Failed) -> None:
        if call := self._calls.pop(number, None):
            call.end(outcome)

    def _withdraw(self, link: Link, call: Call) -> None:
        if not call.is_withdrawing:
            call.is_withdrawing = True
            link.send(Withdrawal(call.number))

    async def _decide(
        self, link: Link, call: Call, decide: Decide, words: Sequence[bytes]
    ) -> None:
        """Tells the hub what `decide` comes to; an error stays with the call."""
        try:
            verdict = await finish(decide(words))
            if len(verdict) > MAX_WORD_BYTES:
                text = f"a verdict of {len(verdict)} bytes: at most {MAX_WORD_BYTES}"
                raise InvalidArgumentError(text)  # noqa: TRY301 - it ends as any other
            link.send(Decision(call.number, verdict))
        except Exception as error:  # noqa: BLE001 - every member raises it
            call.decided = error
            failure = decision_failure(self.rank, error)
            link.send(Decision(call.number, failure=failure))
        except BaseException as error:
            # The loop is being ended: the others must not wait for that.
            failure = decision_failure(self.rank, error)
            link.send(Decision(call.number, failure=failure))
            raise
        finally:
            del call  # as in `threads.settle`

    async def _object(
        self, key: Key, error: Exception, told: Failure, scope: str
    ) -> Exception | None:
        try:
            link = await self._connected()
        except Exception as failure:  # noqa: BLE001 - it is what `consult` would raise
            return failure
        for call in [c for c in self._consulting if c.key == key]:
            if not (call.is_withdrawing or call.cause or call.outcome.done()):
                call.cause = error
                link.send(Veto(call.number, told, scope))
            await asyncio.wait([call.outcome])
            if not call.outcome.cancelled():
                return call.result()
        if self._end is not None:
            return made(self._end)
        topic, members = key
        call = self._call(topic, members)
        call.cause = error
        link.send(Objection(call.number, topic, told, members, scope))
        await call.outcome
        return call.result()

    def _give_up(self) -> None:
        wait_s = 2 * self._timeout_s
        self.lose(Failure(f"rank 0 said nothing for {wait_s:g} s", "peer", 0, "lost"))
        if self._link is not None:
            self._link.abort()

    async def _close(self) -> None:
        self.lose(_CLOSED)
        self._end = _CLOSED
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())
        async with self._connecting:
            link, self._link = self._link, None
            try:
                if link is not None:
                    await link.close()
            finally:
                await self._door.close()
