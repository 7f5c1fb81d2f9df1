"""Which published tags to keep: small policy objects, combined by "any keeps".

The engine asks after each commit, and removes neither the newest tag, nor the one that
`latest` names, nor the one just committed.
"""

__all__ = ["KeepEvery", "KeepLast", "RetentionPolicy", "expired"]

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from aiockpt.errors import InvalidArgumentError


@runtime_checkable
class RetentionPolicy(Protocol):
    """Chooses among published tags."""

    def keeps(self, tags: Sequence[str]) -> set[str]:
        """The tags to keep, out of `tags` (published, oldest first). Pure."""
        ...


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keeps the newest `count` tags."""

    count: int

    def __post_init__(self) -> None:
        _check_count("KeepLast", self.count)

    def keeps(self, tags: Sequence[str]) -> set[str]:
        """The last `count` of `tags`."""
        return set(tags[-self.count :])


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Keeps tags whose last number is a multiple of `period`.

    `KeepEvery(1000)` keeps `step-1000` and `step-2000`. A tag without a number
    has no place in the sequence and is kept.
    """

    period: int

    def __post_init__(self) -> None:
        _check_count("KeepEvery", self.period)

    def keeps(self, tags: Sequence[str]) -> set[str]:
        """Those of `tags` that fall on the period."""
        return {tag for tag in tags if _number(tag) % self.period == 0}


def _check_count(policy: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        message = f"{policy} needs a whole number of at least 1, not {count!r}"
        raise InvalidArgumentError(message)


def _number(tag: str) -> int:
    numbers = re.findall(r"\d+", tag)
    return int(numbers[-1]) if numbers else 0


def expired(tags: Sequence[str], policies: Sequence[RetentionPolicy]) -> list[str]:
    """Tags (of `tags`, oldest first) that no policy keeps; never the newest.

    With no policy nothing expires.
    """
    if not policies or not tags:
        return []
    kept = {tags[-1]}.union(*(policy.keeps(tags) for policy in policies))
    return [tag for tag in tags if tag not in kept]
