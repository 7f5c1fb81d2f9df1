"""One end of a connection between a member and the hub: frames over TCP."""

__all__ = ["Connection", "ProtocolError"]

import asyncio
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Generic, TypeVar, cast

import msgspec
from typing_extensions import override

from aiockpt.ranks.messages import MAX_GREETING_BYTES, FromHub, FromMember, framed

M = TypeVar("M", bound=FromMember | FromHub)

_logger = logging.getLogger(__name__)

_LENGTH_BYTES = 4

# A machine that vanished is noticed within about 30 seconds, in silence (keepalive)
# as well as while something is on its way to it (user timeout).
_SOCKET_OPTIONS = (
    ("SOL_SOCKET", "SO_KEEPALIVE", 1),
    ("IPPROTO_TCP", "TCP_NODELAY", 1),
    ("IPPROTO_TCP", "TCP_KEEPIDLE", 15),
    ("IPPROTO_TCP", "TCP_KEEPINTVL", 5),
    ("IPPROTO_TCP", "TCP_KEEPCNT", 3),
    ("IPPROTO_TCP", "TCP_USER_TIMEOUT", 30_000),
)


class ProtocolError(Exception):
    """The other end said what it must not say."""


class Connection(asyncio.Protocol, ABC, Generic[M]):
    """Takes frames apart and puts them together; all on the loop it was made on.

    Attributes:
        ended: Done once the connection is gone.
        max_frame_bytes: A longer frame ends the connection.
    """

    def __init__(self, decoder: "msgspec.msgpack.Decoder[M]") -> None:
        """Begins small: frames may be as long as a greeting."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.max_frame_bytes = MAX_GREETING_BYTES
        self._decoder = decoder
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    @abstractmethod
    def received(self, message: M) -> None:
        """Acts on one message.

        Raises:
            ProtocolError: It must not be said, or not now.
        """

    def send(self, message: FromMember | FromHub) -> None:
        """Queues a message; one for a connection that is ending goes nowhere."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(framed(message))

    def hang_up(self) -> None:
        """Ends the connection once what was sent is on its way."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Tunes the socket."""
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        for level, name, value in _SOCKET_OPTIONS:
            if hasattr(socket, name):
                sock.setsockopt(getattr(socket, level), getattr(socket, name), value)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Notes the end."""
        self._buffer.clear()
        if not self.ended.done():
            self.ended.set_result(None)

    @override
    def data_received(self, data: bytes) -> None:
        """Acts on the frames that are whole; what is wrong ends the connection."""
        self._buffer += data
        try:
            for frame in self._frames():
                self.received(self._decoder.decode(frame))
                if self._transport is None or self._transport.is_closing():
                    break
        except (ProtocolError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            _logger.warning("a connection is closed: %s", error)
            self.abort()

    def _frames(self) -> Iterator[bytes]:
        """The frames that are whole, taken out of the buffer."""
        start, buffer = 0, self._buffer
        try:
            while len(buffer) - start >= _LENGTH_BYTES:
                at = start + _LENGTH_BYTES
                nbytes = int.from_bytes(buffer[start:at])
                if nbytes > self.max_frame_bytes:
                    raise ProtocolError(f"a frame of {nbytes} bytes")
                if len(buffer) - at < nbytes:
                    return
                start = at + nbytes
                yield bytes(buffer[at:start])
        finally:
            # Once a read, not once a frame: many small ones come together.
            del buffer[:start]
