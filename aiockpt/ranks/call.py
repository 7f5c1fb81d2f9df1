"""One call of `consult` or `object`, as its member knows it."""

__all__ = ["Call"]

import asyncio
from collections.abc import Sequence

from aiockpt.errors import (
    EngineStateError,
    InvalidArgumentError,
    PeerError,
)
from aiockpt.ranks.failures import made
from aiockpt.ranks.instance import Key
from aiockpt.ranks.messages import Failed


class Call:
    """Waits for the hub.

    Attributes:
        number: Among the calls of this member.
        key: Topic and group.
        words: All words, where this member is to decide; None where there is nothing
            to decide any more.
        outcome: The verdict, or why there is none; cancelled where it was withdrawn.
        is_withdrawing: Whether the hub was asked to forget it.
        cause: What this member objected with.
        decided: What this member's `decide` raised.
        timer: Gives the hub up.
    """

    def __init__(self, number: int, key: Key) -> None:
        """Nothing is known yet."""
        loop = asyncio.get_running_loop()
        self.number = number
        self.key = key
        self.words: asyncio.Future[Sequence[bytes] | None] = loop.create_future()
        self.outcome: asyncio.Future[bytes | Failed] = loop.create_future()
        self.is_withdrawing = False
        self.cause: Exception | None = None
        self.decided: Exception | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def chair(self) -> int:
        """Who decides."""
        members = self.key[1]
        return members[0] if members else 0

    def hear(self, words: Sequence[bytes]) -> None:
        """This member is to decide on the words."""
        if not self.words.done():
            self.words.set_result(words)

    def end(self, outcome: bytes | Failed) -> None:
        """Tells whoever waits."""
        self.stop_timer()
        if not self.words.done():
            self.words.set_result(None)
        self.outcome.set_result(outcome)

    def forget(self) -> None:
        """It is as if the call had not been made."""
        self.stop_timer()
        self.words.cancel()
        self.outcome.cancel()

    def result(self) -> Exception | None:
        """A new error that says why there is no verdict; None where there is one."""
        outcome = self.outcome.result()
        return self.error(outcome) if isinstance(outcome, Failed) else None

    def error(self, failed: Failed) -> Exception:
        """The error that is raised for a failure: a new one, or what `decide` raised."""
        known = (InvalidArgumentError, EngineStateError, PeerError)
        if failed.is_own and isinstance(self.decided, known):
            return self.decided
        error = made(failed.failure)
        if failed.is_own:
            error.__cause__ = self.decided or self.cause
        return error

    def stop_timer(self) -> None:
        """However long it takes, it is not given up."""
        if self.timer is not None:
            self.timer.cancel()
