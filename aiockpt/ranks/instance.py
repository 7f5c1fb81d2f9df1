"""One use of a topic, as the hub knows it."""

__all__ = ["Instance", "Key"]

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import asyncio

    from aiockpt.ranks.messages import Failure

# A topic is another one for another group; None stands for all ranks.
Key: TypeAlias = tuple[str, tuple[int, ...] | None]


class Instance:
    """It collects words; then the chair decides. Or it fails, until all know.

    Attributes:
        key: Topic and group.
        members: The group, the chair first.
        came: Who has used it: handed in a word, was told that it failed, or is gone.
        words: What was handed in.
        waiting: By rank, the calls that have not been told the outcome.
        opened_s: When the first came, on the loop's clock.
        is_deciding: Whether the chair has the words.
        failure: Why it failed; None as long as it has not.
        scope: How topics begin that fail with it; empty where none do.
        timer: What happens next if nothing does.
    """

    __slots__ = (
        "came",
        "failure",
        "is_deciding",
        "key",
        "members",
        "opened_s",
        "scope",
        "timer",
        "waiting",
        "words",
    )

    def __init__(self, key: Key, members: Sequence[int], opened_s: float) -> None:
        """Nobody has come yet."""
        self.key = key
        self.members = members
        self.opened_s = opened_s
        self.came: set[int] = set()
        self.words: dict[int, bytes] = {}
        self.waiting: dict[int, int] = {}
        self.is_deciding = False
        self.failure: Failure | None = None
        self.scope = ""
        self.timer: asyncio.TimerHandle | None = None

    @property
    def chair(self) -> int:
        """Who decides."""
        return self.members[0]

    @property
    def have_all_come(self) -> bool:
        """Whether nobody is left who does not know of it."""
        return len(self.came) == len(self.members)

    @property
    def is_collecting(self) -> bool:
        """Whether words can still be handed in and withdrawn."""
        return self.failure is None and not self.is_deciding

    def missing(self) -> list[int]:
        """Who has not come."""
        return [rank for rank in self.members if rank not in self.came]

    def take_words(self) -> list[bytes]:
        """The words in the order of the group; they are kept no longer."""
        words = [self.words[rank] for rank in self.members]
        self.words.clear()
        return words

    def stop_timer(self) -> None:
        """Lets time pass."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
