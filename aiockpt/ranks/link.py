"""A member's ways to the hub: in the same process, or over a socket."""

__all__ = ["HubConnection", "LocalLink", "dial"]

import asyncio
import socket
from collections.abc import Callable

import msgspec
from typing_extensions import override

from aiockpt.ranks.connection import Connection, ProtocolError
from aiockpt.ranks.failures import lost
from aiockpt.ranks.forks import keep_from_children
from aiockpt.ranks.hub import Hub
from aiockpt.ranks.member import Link, Member
from aiockpt.ranks.messages import (
    MAX_FRAME_BYTES,
    Farewell,
    FromHub,
    FromMember,
    Goodbye,
    Hello,
    Join,
    Welcome,
)

# How long the other end may take to say goodbye as well.
_GOODBYE_S = 5.0

_decoder: "msgspec.msgpack.Decoder[FromHub]" = msgspec.msgpack.Decoder(FromHub)


class LocalLink(Link):
    """To a hub of this process."""

    def __init__(self, hub: Hub, member: Member) -> None:
        """The member joins the hub.

        Raises:
            ProtocolError: It has joined before.
        """
        self._hub = hub
        self._rank = member.rank
        hub.join(self._rank, member.received)

    @override
    def send(self, message: FromMember) -> None:
        """See `Link.send`."""
        self._hub.receive(self._rank, message)

    @override
    def abort(self) -> None:
        """See `Link.abort`."""
        self._hub.leave(self._rank, "lost")

    @override
    async def close(self) -> None:
        """See `Link.close`."""
        self._hub.leave(self._rank, "closed")


class HubConnection(Connection[FromHub], Link):
    """To a hub elsewhere.

    Attributes:
        is_welcome: Done once the hub would take this rank in; cancelled where it
            will not.
    """

    def __init__(self, hello: Hello, member: Member) -> None:
        """Says `hello` as soon as there is a connection."""
        super().__init__(_decoder)
        self.is_welcome: asyncio.Future[None]
        self.is_welcome = asyncio.get_running_loop().create_future()
        self._hello = hello
        self._member = member
        self._is_joined = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greets the hub."""
        super().connection_made(transport)
        self.send(self._hello)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Tells the member, where it was one."""
        super().connection_lost(exc)
        if self._is_joined:
            self._member.lose(lost(0, "lost"))
        else:
            self.is_welcome.cancel()  # which does nothing where it is done

    @override
    def received(self, message: FromHub) -> None:
        """See `Connection.received`."""
        if self._is_joined:
            self._member.received(message)
            if isinstance(message, Farewell):
                self.hang_up()
        elif isinstance(message, Welcome) and not self.is_welcome.done():
            self.is_welcome.set_result(None)
        else:
            raise ProtocolError(f"a hub that begins with {type(message).__name__}")

    @override
    async def close(self) -> None:
        """See `Link.close`."""
        self.send(Goodbye())
        try:
            # The hub closes the connection: then it has read the goodbye.
            await asyncio.wait([self.ended], timeout=_GOODBYE_S)
        finally:
            self.abort()
        await asyncio.wait([self.ended])

    def join(self) -> None:
        """From here on this is the member's connection: its end is the hub's loss.

        Raises:
            ConnectionError: The hub did not welcome it.
        """
        if self.is_welcome.cancelled() or self.ended.done():
            raise ConnectionRefusedError("it is not the hub that listens there")
        self._is_joined = True
        self.max_frame_bytes = MAX_FRAME_BYTES + 1024
        self.send(Join())


async def dial(
    host: str, port: int, make: Callable[[], HubConnection]
) -> HubConnection:
    """A connection that the hub at a numeric address has welcomed.

    Raises:
        OSError: Nobody is there, or it is not the hub.

    If cancelled: the connection is closed.
    """
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    keep_from_children(sock)
    try:
        sock.settimeout(0)
        await loop.sock_connect(sock, (host, port))
    except BaseException:
        sock.close()
        raise
    _, connection = await loop.create_connection(make, sock=sock)
    try:
        await asyncio.wait([connection.is_welcome])
        # Not sooner: a caller that is cancelled in between was never a member.
        connection.join()
    except BaseException:
        connection.abort()
        raise
    return connection
