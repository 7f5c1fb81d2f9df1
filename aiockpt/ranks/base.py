"""The ranks port: how the processes of one job decide something together."""

__all__ = ["Decide", "Ranks"]

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

# From the words of all members, in the order of their ranks, to the verdict.
Decide = Callable[[Sequence[bytes]], Awaitable[bytes]]


class Ranks(Protocol):
    """The job that this process is a part of. Used on the engine's loop.

    Attributes:
        rank: This process, from 0.
        world_size: Processes in the job.
    """

    rank: int
    world_size: int

    async def consult(
        self,
        topic: str,
        word: bytes,
        decide: Decide,
        *,
        group: Sequence[int] | None = None,
    ) -> bytes:
        """Hands in this rank's word on a topic; returns the verdict on all words.

        Every member calls this with the same topic. Once the words of all are there,
        the chair (the first of the group, by default rank 0) runs its own `decide` on
        them, in the order of the group, and what that returns is returned on every
        member. The `decide` of the others is not called. A topic that is used again
        is a new one: the nth calls of the members belong together.

        Args:
            topic: What it is about; the same text on every member.
            word: What this rank has to say.
            decide: Makes the verdict. It is never cancelled.
            group: The members, this one among them; by default all ranks.

        Raises:
            PeerError: A member objected, was lost, or did not come in time; or
                `decide` failed, as that of the chair. The same on every member.
            InvalidArgumentError: `decide` raised it; on every member.
            EngineStateError: `decide` raised it, on every member; or this was closed.

        If cancelled: before all words are there, this rank's word is withdrawn, as if
        it had not been called. After that it is too late: the verdict is waited for
        and returned, and the cancellation is dropped.
        """
        ...

    async def object(
        self,
        topic: str,
        error: Exception,
        phase: str,
        *,
        group: Sequence[int] | None = None,
        scope: str = "",
    ) -> Exception | None:
        """Makes a topic fail on every member, also on those that come to it later.

        It stands for this rank's call of `consult`, before it or while it waits.

        Args:
            topic: As for `consult`.
            error: What is wrong; it is told to the others as text.
            phase: What this rank was doing.
            group: As for `consult`.
            scope: Topics that begin with this fail as well, of whatever group: those
                that members wait for, and those that they come to before they have
                all been told of this one. Not where this comes too late.

        Returns:
            What every member raises: of the first that objected, a `PeerError`, whose
            cause is `error` where that was this rank. None if it came too late, and
            the verdict stands.

        If cancelled: it is finished first.
        """
        ...

    async def insist(self, topic: str) -> None:
        """Called by rank 0 inside `decide`, before what it cannot take back.

        From here on rank 0 does not give the topic up: either all are told that it took
        too long and this raises, or all are told what `decide` comes to. Only a rank
        that hears nothing of rank 0 for twice the deadline takes it for lost.

        Args:
            topic: One of all ranks, on which rank 0 is deciding.

        Raises:
            PeerError: The others have been told that it took too long.
        """
        ...

    async def close(self) -> None:
        """Leaves the job: whoever still waits for this rank is told. Idempotent.

        If cancelled: it is finished first.
        """
        ...
