"""How the ranks of a job open an attempt at a tag together.

It is one question: rank 0 makes the directory, everyone joins it. Who does not see that
directory has a disk of its own, another *place*.
"""

__all__ = ["Place", "TagOptions", "open_place"]

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import msgspec

from aiockpt.catalog import Catalog
from aiockpt.errors import CheckpointError, PeerError
from aiockpt.ranks.base import Ranks
from aiockpt.threads import finish, outlast, run_blocking

_logger = logging.getLogger(__name__)

_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True, kw_only=True)
class TagOptions:
    """How a tag is to be published.

    Attributes:
        is_overwrite: Whether it may take the place of a published tag.
        adopts: Whether files that others put into the tag's directory stay in it.
        points_latest: Whether `latest` is moved to it.
    """

    is_overwrite: bool = False
    adopts: bool = False
    points_latest: bool = True


class Place(msgspec.Struct, frozen=True):
    """Where this rank's part of an attempt is made.

    Attributes:
        directory: The attempt's directory, relative to the root.
        name: Unique among all attempts at all tags of the root.
        number: The rank that publishes in this root.
        hosts: The host of each place, by its number; empty where there is only one.
    """

    directory: str
    name: str
    number: int = 0
    hosts: dict[int, str] = {}


class _Opening(msgspec.Struct, frozen=True):
    directory: str
    name: str


async def open_place(
    ranks: Ranks, catalog: Catalog, clerks: Executor, tag: str, options: TagOptions
) -> Place:
    """Opens an attempt at `tag` on all ranks.

    Raises:
        EngineStateError: The tag is published, and not to be overwritten.
        InvalidArgumentError: A foreign file or directory has that name.
        StorageError: The root cannot be made or written; where ranks have a part in
            it, all raise a `PeerError` instead, whose cause this is where it happened.
        PeerError: A rank could not.

    If cancelled: before all ranks have called it, as if it had not been called; after
    that the tag is open, or nothing is open here and the other ranks are told.
    """

    def make() -> _Opening:
        catalog.check_free(
            tag, is_overwrite=options.is_overwrite, is_foreign_kept=options.adopts
        )
        catalog.open_work()
        return _Opening(*catalog.new_directory())

    async def decide(_words: Sequence[bytes]) -> bytes:
        return _encode(await run_blocking(clerks, make))

    verdict = await ranks.consult(f"create {tag}", b"", decide)
    opening = msgspec.json.decode(verdict, type=_Opening)
    place = Place(opening.directory, opening.name)
    if ranks.world_size == 1:
        return place
    try:
        hosts = await _join(ranks, catalog, clerks, place)
        if not hosts:
            return place
        number = await finish(_own_place(ranks, catalog, clerks, place))
    except BaseException:
        await outlast(_discard(catalog, clerks, place))
        raise
    return Place(place.directory, place.name, number, hosts)


async def _discard(catalog: Catalog, clerks: Executor, place: Place) -> None:
    try:
        await run_blocking(clerks, catalog.discard, place.directory)
    except CheckpointError as error:
        _logger.warning("%s remains to be swept: %s", place.directory, error)


async def _join(
    ranks: Ranks, catalog: Catalog, clerks: Executor, place: Place
) -> dict[int, str]:
    """Sees to it that all ranks have the directory; the hosts of the places."""
    topic = f"open {place.name}"

    async def decide(words: Sequence[bytes]) -> bytes:  # noqa: ASYNC124 - as `consult` wants it
        hosts = {rank: word.decode() for rank, word in enumerate(words) if word}
        return _encode(hosts if len(hosts) > 1 else {})

    try:
        is_leader = ranks.rank == 0 or await run_blocking(
            clerks, catalog.join, place.directory, ranks.rank
        )
        # No host is nameless: those without a name are no leaders.
        host = (os.uname().nodename or "localhost") if is_leader else ""
        verdict = await ranks.consult(topic, host.encode(), decide)
    except PeerError:
        # That is the verdict: there is nobody left to tell.
        raise
    except Exception as error:
        raise await outlast(ranks.object(topic, error, "create")) or error from error
    except BaseException:
        await outlast(ranks.object(topic, RuntimeError("cancelled"), "create"))
        raise
    return msgspec.json.decode(verdict, type=dict[int, str])


async def _own_place(
    ranks: Ranks, catalog: Catalog, clerks: Executor, place: Place
) -> int:
    """The rank that publishes in this root; known on all ranks, or nowhere open."""
    topic = f"place {place.name}"

    async def decide(_words: Sequence[bytes]) -> bytes:  # noqa: ASYNC124 - as `consult` wants it
        return b""

    try:
        number = await run_blocking(clerks, catalog.place, place.directory)
    except Exception as error:
        raise await ranks.object(topic, error, "create") or error from error
    await ranks.consult(topic, b"", decide)
    return number
