"""The hub's door to the network."""

__all__ = ["HubServer"]

import asyncio
import contextlib
import hmac
import logging
import resource
import socket
from functools import partial
from typing import Any

import msgspec
from typing_extensions import override

from aiockpt.ranks.connection import Connection, ProtocolError
from aiockpt.ranks.forks import keep_from_children
from aiockpt.ranks.hub import Hub
from aiockpt.ranks.messages import (
    MAX_WORD_BYTES,
    FromMember,
    Goodbye,
    Hello,
    Join,
    Welcome,
)

_logger = logging.getLogger(__name__)

# How long a connection may take to say who it is, and a member to say goodbye.
_GREETING_S = 10.0
_GOODBYE_S = 5.0
# What the process has open besides its members.
_SPARE_FDS = 512

_decoder: "msgspec.msgpack.Decoder[FromMember]" = msgspec.msgpack.Decoder(FromMember)


class HubServer:
    """A hub that listens on all addresses of this machine.

    Attributes:
        hub: It.
        port: Where it listens.
    """

    def __init__(self, hub: Hub, world_size: int, token: str) -> None:
        """Listens once `start` has returned.

        Args:
            hub: Where the members' words come together.
            world_size: Ranks of the job; a member that thinks otherwise is refused.
            token: What members know and strangers do not.
        """
        self.hub = hub
        self.port = 0
        self.token = token
        self.world_size = world_size
        self._guests: set[_Guest] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listens.

        Raises:
            OSError: The system has no socket for it.

        If cancelled: it does not listen.
        """
        _make_room(self.world_size + _SPARE_FDS)
        sock = _listening_socket()
        # All members come at once.
        backlog = max(self.world_size, 64)
        self._server = await asyncio.get_running_loop().create_server(
            partial(_Guest, self), sock=sock, backlog=backlog, start_serving=False
        )
        self.port = sock.getsockname()[1]
        try:
            await self._server.start_serving()
        except BaseException:
            self._stop_listening()
            raise

    async def close(self) -> None:
        """Says farewell to the members; nothing is left then. Idempotent.

        If cancelled: what is left is aborted.
        """
        self._stop_listening()
        self.hub.close()
        try:
            # Members close first. Were this end to close with something unread, its
            # system would send a reset, and what was said last might be lost with it.
            await self._guests_ended(_GOODBYE_S)
        finally:
            for guest in list(self._guests):
                guest.abort()
        await self._guests_ended(None)

    def welcome(self, guest: "_Guest") -> None:
        """The connection is open."""
        self._guests.add(guest)

    def dismiss(self, guest: "_Guest") -> None:
        """The connection is gone."""
        self._guests.discard(guest)

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _guests_ended(self, timeout_s: float | None) -> None:
        ends = [guest.ended for guest in self._guests]
        if ends:
            await asyncio.wait(ends, timeout=timeout_s)


class _Guest(Connection[FromMember]):
    """The hub's end of a connection: a stranger, who may become a member."""

    def __init__(self, server: HubServer) -> None:
        super().__init__(_decoder)
        self._server = server
        self._hub = server.hub
        self._rank: int | None = None
        self._is_member = False
        self._timer: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.welcome(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_GREETING_S, self.abort)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._server.dismiss(self)
        self._stop_timer()
        if self._is_member and self._rank is not None:
            self._hub.leave(self._rank, "lost")

    @override
    def received(self, message: FromMember) -> None:
        match message:
            case Hello() if self._rank is None:
                self._greet(message)
            case Join() if self._rank is not None and not self._is_member:
                # Not before: one that gives up during the greeting may come again.
                self._hub.join(self._rank, self.send)
                self._is_member = True
                self.max_frame_bytes = MAX_WORD_BYTES + (1 << 20)
            case Goodbye() if self._rank is not None and self._is_member:
                self._hub.leave(self._rank, "closed")
                self.hang_up()
            case _ if self._rank is not None and self._is_member:
                self._hub.receive(self._rank, message)
            case _:
                raise ProtocolError(f"it begins with {type(message).__name__}")

    def _greet(self, hello: Hello) -> None:
        server = self._server
        if not hmac.compare_digest(hello.token.encode(), server.token.encode()):
            raise ProtocolError("it does not belong to this job")
        if hello.world_size != server.world_size:
            text = f"it is of {hello.world_size} ranks, this job of {server.world_size}"
            raise ProtocolError(text)
        self._hub.check_rank(hello.rank)
        self._rank = hello.rank
        # It belongs to the job: however slow it is from here on, it is waited for.
        self._stop_timer()
        self.send(Welcome())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class _Listener(socket.socket):
    """Keeps itself, and what it accepts, from children that are forked."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        keep_from_children(self)

    @override
    def accept(self) -> tuple[socket.socket, Any]:
        sock, place = super().accept()
        keep_from_children(sock)
        return sock, place


def _listening_socket() -> socket.socket:
    """IPv6 and IPv4 on one port, or IPv4 where the system knows no other."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return _Listener(
                socket.create_server(
                    ("", 0), family=socket.AF_INET6, dualstack_ipv6=True
                )
            )
    return _Listener(socket.create_server(("", 0)))


def _make_room(num_fds: int) -> None:
    """Lets this process have `num_fds` descriptors open, if the system allows it.

    A member takes one, and many systems allow 1 024 unless asked: with more ranks
    the last would never be let in.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= num_fds:
        return
    wanted = num_fds if hard == resource.RLIM_INFINITY else min(num_fds, hard)
    if wanted < num_fds:
        _logger.warning("only %d files can be open: %d are needed", wanted, num_fds)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
